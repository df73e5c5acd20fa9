"""Between text and token ids: chat template, encoding, text as it is generated, stop strings.

`ChatTokenizer.encode_chat` is called in worker threads: `encode_batch_fast` lets other threads
run, `encode` does not.  `TextStream` and `StopMatcher` belong to one sequence, engine thread.
"""

import re
from collections.abc import Sequence
from functools import cached_property

import jinja2
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from agent_memory.block import common_tokens, token_bytes
from agent_memory.errors import BadRequest, ModelRefused
from agent_memory.model.answers import AnswerReader, Markers
from agent_memory.model.patience import OutOfPatience, patience
from agent_memory.request import Conversation, Prompt

TEMPLATE_S = 10.0
"""For one conversation; a thousandth of it is usual."""

_WORD = re.compile(r"[A-Za-z_]\w*")


def _remember_no_words(backend: Tokenizer) -> None:
    """tokenizers keeps some MB of words for each thread that ever read with it, and never lets go
    of them, so that each load of a model would cost them again.  Without, reading takes a tenth
    longer."""
    if resize := getattr(backend.model, "_resize_cache", None):  # some kinds keep none
        resize(0)


class ChatTokenizer:
    def __init__(self, wrapper: TokenizerWrapper) -> None:
        backend = getattr(wrapper, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelRefused(
                "The model has no tokenizer.json, which this server reads text with."
            )
        _remember_no_words(backend)
        self._wrapper = wrapper
        self._backend = backend
        self.end_of_turn = frozenset(int(i) for i in wrapper.eos_token_ids)
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self._markers = Markers.of(wrapper)
        known = {i: str(added[i].content) for i in self.special}
        self.silent = frozenset(i for i, name in known.items() if not self._markers.hold(name))

    def tokens_of(self, prompt: Prompt) -> Sequence[int]:
        """A text's begin as the tokenizer begins texts; tokens are taken as they are."""
        if isinstance(prompt, Conversation):
            return self.encode_chat(prompt)
        return self.encode(prompt, begin=True) if isinstance(prompt, str) else prompt

    def encode_chat(self, conversation: Conversation) -> list[int]:
        """The prompt of a conversation, up to where the model's answer begins."""
        return self.encode(self.render(conversation))

    def stable_tokens(self, conversation: Conversation, prompt: Sequence[int]) -> int:
        """How much of a conversation's prompt its next one surely has too: all but what is there
        only to make the model answer, such as an opened thought."""
        said = self.encode(self.render(conversation, add_generation_prompt=False))
        return common_tokens(token_bytes(said), token_bytes(prompt))

    @cached_property
    def template_words(self) -> frozenset[str]:
        """Among them the names of all that the chat template asks for."""
        template = self._wrapper.chat_template
        sources = template.values() if isinstance(template, dict) else [template or ""]
        return frozenset(word for source in sources for word in _WORD.findall(source))

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> str:
        if not self._wrapper.has_chat_template:
            raise BadRequest("This model has no chat template, so it cannot serve conversations.")
        going_on = conversation.goes_on and add_generation_prompt
        try:
            with patience(TEMPLATE_S):
                text: str = self._wrapper.apply_chat_template(
                    [dict(message) for message in conversation.messages],
                    tools=[dict(tool) for tool in conversation.tools] or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt and not going_on,
                    **({"continue_final_message": True} if going_on else {}),
                    **conversation.options,
                )
        except OutOfPatience as error:
            raise BadRequest(
                f"The model's chat template was not done with this conversation in "
                f"{TEMPLATE_S:.0f} s. Serve a model with another one.",
                param="messages",
            ) from error
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRequest(
                f"The model's chat template refuses this conversation: {error}", param="messages"
            ) from error
        except ValueError as error:
            if not going_on:
                raise
            raise BadRequest(
                "The model's chat template cannot go on with the assistant's last message. End the "
                "conversation with a user's.",
                param="messages",
            ) from error
        return text

    def reader(
        self, prompt: Sequence[int], *, tools: Sequence[object], forced: bool
    ) -> AnswerReader:
        """Of the answer to a prompt.  `forced`: a grammar makes it, and its calls have our form."""
        thinks = bool(self.end_of_thought(prompt))
        return AnswerReader(self._markers, tools, thinks=thinks, forced=forced)

    def end_of_thought(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The tokens that end the thought which the prompt has opened; none if it has not."""
        wrapper = self._wrapper
        if not wrapper.has_thinking:
            return ()
        opened = wrapper.rfind_think_start(prompt) > wrapper.rfind_think_end(prompt)
        return tuple(wrapper.think_end_tokens) if opened else ()

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        try:
            [encoded] = self._backend.encode_batch_fast([text], add_special_tokens=begin)
        except (UnicodeEncodeError, TypeError) as error:
            raise BadRequest(
                "The text holds half a surrogate pair, which is no character.", param="messages"
            ) from error
        return list(encoded.ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens, too.  What is no whole character at either end is U+FFFD."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def starts(self, text: str) -> list[tuple[int, int]]:
        """(token, its first character) of a whole text."""
        [encoded] = self._backend.encode_batch([text], add_special_tokens=False)
        return [(i, start) for i, (start, _) in zip(encoded.ids, encoded.offsets, strict=True)]

    def to_json(self) -> str:
        """As in a tokenizer.json, with what was added to it."""
        return self._backend.to_str()

    def stream(self) -> "TextStream":
        return TextStream(self._backend, self.silent)


class TextStream:
    """Tokens in, whole characters out; an incomplete one at the very end is never emitted."""

    def __init__(self, backend: Tokenizer, silent: frozenset[int] = frozenset()) -> None:
        """`silent`: tokens that are no text."""
        self._backend = backend
        self._silent = silent
        self._stream = DecodeStream(skip_special_tokens=False)

    def add(self, token: int) -> str:
        return "" if token in self._silent else self._stream.step(self._backend, token) or ""


class StopMatcher:
    """Finds stop strings in text that arrives in pieces; nothing from a stop string on gets out.

    The one that is complete first counts, of several the longest, wherever the pieces begin.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit: str | None = None

    def add(self, text: str) -> str:
        """-> the text that is surely before any stop string."""
        assert self.hit is None
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self._stops]
        found = [(at + len(stop), at, stop) for at, stop in places if at >= 0]
        if found:
            _, at, self.hit = min(found)
            self._held = ""
            return text[:at]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when generation ended without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
