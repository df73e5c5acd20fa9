"""Answers that must follow a grammar: from a JSON schema or a grammar to which token may come next.

Knows llguidance and the tokenizer's bytes, and that grammars come from strangers: what it takes to
compile one and to go a step is bounded.  Knows nothing of sequences or logits.  `Grammars`: any
thread, and compiling takes a while, so a worker's.  A `Constraint`: one thread at a time.
"""

import threading
from collections.abc import Callable, Collection, Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from agent_memory.errors import BadRequest

MAX_GRAMMAR_BYTES = 128 << 10
STACK_BYTES = 512 << 20
"""Of a thread that compiles: references to references are followed by recursion, some 4 KB each,
and a text of MAX_GRAMMAR_BYTES has at most so many.  Only pages that are touched count."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,  # of what must be compiled before the first token
    step_lexer_fuel=100_000,  # about 7 ms
    max_lexer_states=50_000,  # 1 to 2 KB each
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,  # they show the parser's insides
)
_stack_size = threading.Lock()


class Constraint:
    """What may follow what was accepted so far, and nothing else: a function of these tokens.

    A grammar that turns out to be too complex on the way raises in `mask`, not in `accept`.  With
    `opening`, tokens that must come first, anything but an end may come before these.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        end_of_turn: Sequence[int],
        opening: tuple[int, ...] = (),
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_of_turn = end_of_turn
        self._opening = opening
        self._last: tuple[int, ...] = ()  # tokens, while the opening has not come

    @property
    def _is_open(self) -> bool:
        return self._last == self._opening

    def mask(self) -> np.ndarray:
        """bool [vocab_size]; some token is allowed.  Raises BadRequest."""
        if not self._is_open:
            anything = np.ones(self._vocab_size, bool)
            anything[self._end_of_turn] = False
            return anything
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _too_complex(self._matcher.get_error())
        allowed = np.zeros(self._vocab_size, bool)
        known = np.unpackbits(bits, count=min(8 * len(bits), self._vocab_size), bitorder="little")
        allowed[: len(known)] = known
        if not allowed.any():
            raise _refused("The model has no token that can go on with this grammar.")
        return allowed

    def accept(self, token: int) -> None:
        if self._is_open:
            self._matcher.consume_token(token)
        else:
            self._last = (*self._last, token)[-len(self._opening) :]

    @property
    def is_over(self) -> bool:
        """Nothing but the end of turn may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> "Constraint":
        assert not self._last
        return Constraint(
            self._matcher.deep_copy(), self._vocab_size, self._end_of_turn, self._opening
        )


class Grammars:
    """Of one tokenizer.  `vocab_size`: how wide logits are, which may be more or less than the
    tokenizer has tokens.  `end_of_turn`: any of them may come where the grammar lets it end."""

    def __init__(
        self, tokenizer_json: Callable[[], str], vocab_size: int, end_of_turn: Collection[int]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._end_of_turn = sorted(end_of_turn)
        self._tokenizer: LLTokenizer | None = None
        self._building = threading.Lock()

    def bytes_of(self, token: int) -> bytes:
        """Of a token's text, which may be a part of a character."""
        return bytes(self._built().decode_bytes([token]))

    def constraint(self, grammar: str, opening: tuple[int, ...] = ()) -> Constraint:
        """`grammar`: in llguidance's dialect of Lark.  Raises BadRequest with what is wrong."""
        if len(grammar.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
            raise _refused(f"The grammar has more than {MAX_GRAMMAR_BYTES} bytes. Simplify it.")
        tokenizer = self._built()
        matchers: list[LLMatcher] = []
        _on_large_stack(
            lambda: matchers.append(LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS))
        )
        [matcher] = matchers
        if matcher.is_error():
            raise _refused(f"The grammar cannot be used: {matcher.get_error().strip()}")
        _try_out(Constraint(matcher.deep_copy(), self._vocab_size, self._end_of_turn))
        return Constraint(matcher, self._vocab_size, self._end_of_turn, opening)

    def _built(self) -> LLTokenizer:
        with self._building:
            if self._tokenizer is None:
                self._tokenizer = self._build()
            return self._tokenizer

    def _build(self) -> LLTokenizer:
        """Takes about a second for 150,000 tokens."""
        text = self._tokenizer_json()
        try:
            known = LLTokenizer(text, eos_token=self._end_of_turn or None)
            if known.vocab_size >= self._vocab_size:
                return known
            return LLTokenizer(text, self._vocab_size, self._end_of_turn or None)
        except ValueError as error:
            raise BadRequest(
                f"This model's tokenizer cannot be held to a grammar or schema: {error}. Ask "
                "without one, or serve another model.",
                code="unsupported_parameter",
            ) from error


def _try_out(constraint: Constraint) -> None:
    """What no text fits, or is too complex from the beginning, is told before anything is computed.
    Raises BadRequest."""
    constraint.accept(int(np.argmax(constraint.mask())))
    if not constraint.is_over:
        constraint.mask()


def _on_large_stack(function: Callable[[], object]) -> None:
    """The size is one for all threads that begin while it is set: no harm, only address space."""
    thread = threading.Thread(target=function, name="grammar", daemon=True)
    with _stack_size:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()


def _refused(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_grammar")


def _too_complex(reason: str) -> BadRequest:
    return _refused(
        "The grammar allows no text, or it is too complex to be followed: "
        f"{reason.splitlines()[0] if reason else 'for an unknown reason'}. Simplify it."
    )
