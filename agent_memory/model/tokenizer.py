"""Between text and token ids: chat template, encoding, text as it is generated, stop strings.

`ChatTokenizer.encode_chat` is called in worker threads: `encode_batch_fast` lets other threads
run, `encode` does not.  `TextStream` and `StopMatcher` belong to one sequence, engine thread.
"""

from collections.abc import Sequence

import jinja2
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from agent_memory.block import common_tokens, token_bytes
from agent_memory.errors import BadRequest, ModelRefused


class ChatTokenizer:
    def __init__(self, wrapper: TokenizerWrapper) -> None:
        backend = getattr(wrapper, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelRefused(
                "The model has no tokenizer.json, which this server reads text with."
            )
        self._wrapper = wrapper
        self._backend = backend
        self.end_of_turn = frozenset(int(i) for i in wrapper.eos_token_ids)
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The prompt of a conversation, up to where the model's answer begins."""
        return self.encode(self.render(messages))

    def stable_tokens(self, messages: Sequence[dict[str, str]], prompt: Sequence[int]) -> int:
        """How much of a conversation's prompt its next one surely has too: all but what is there
        only to make the model answer, such as an opened thought."""
        said = self.encode(self.render(messages, add_generation_prompt=False))
        return common_tokens(token_bytes(said), token_bytes(prompt))

    def render(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        if not self._wrapper.has_chat_template:
            raise BadRequest("This model has no chat template, so it cannot serve conversations.")
        try:
            text: str = self._wrapper.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise BadRequest(
                f"The model's chat template refuses this conversation: {error}", param="messages"
            ) from error
        return text

    def encode(self, text: str) -> list[int]:
        try:
            [encoded] = self._backend.encode_batch_fast([text], add_special_tokens=False)
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
        return TextStream(self._backend)


class TextStream:
    """Tokens in, whole characters out; an incomplete one at the very end is never emitted."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        return self._stream.step(self._backend, token) or ""


class StopMatcher:
    """Finds stop strings in text that arrives in pieces; nothing from a stop string on gets out.

    The one that is complete first counts, of several the longest, wherever the pieces begin.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """-> the text that is surely before any stop string."""
        assert not self.hit
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops]
        found = [(end, at) for end, at in found if at >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]]
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
