"""Token sequences to train on: chats full of facts, statements, repeats and plain text.

Knows what is worth learning: each token carries a weight in the loss, highest on a recalled value.
Knows nothing of models.
"""

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from random import Random

import numpy as np
from tokenizers import Tokenizer

from benchmarks.builtin_model.facts import (
    HAVE_READ,
    READ_THIS,
    REPEAT_THIS,
    SMALL_TALK,
    Fact,
    Storyteller,
    capital,
)
from benchmarks.builtin_model.tokenizer import END_OF_TEXT, TURN_END, TURN_START

Ids = list[int]
Pieces = list[tuple[Ids, float]]
"""Token ids, and how much each of them counts as something to predict."""

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Sample = tuple[Ints, Ints, Floats]
"""ids [length + 1], positions [length + 1], weights of ids[1:] [length]."""

MARK, ASKED, TOLD, TEXT, SAID, COPIED, VALUE = 0.1, 0.1, 0.15, 0.7, 1.0, 1.5, 4.0
MIX = {"chat": 0.45, "statements": 0.2, "repeat": 0.15, "text": 0.2}


def flat(pieces: Pieces) -> Ids:
    return [token for ids, _ in pieces for token in ids]


def count(pieces: Pieces) -> int:
    return sum(len(ids) for ids, _ in pieces)


def joined(pieces: Pieces) -> tuple[Ints, Floats]:
    """The ids and, for each, its weight."""
    weights = [weight for ids, weight in pieces for _ in ids]
    return np.array(flat(pieces), np.int32), np.array(weights, np.float32)


class Sampler:
    """Samples out of one set of documents and words; `seed` fixes them all."""

    def __init__(
        self, tokenizer: Tokenizer, documents: Sequence[str], words: Sequence[str], seed: int
    ) -> None:
        self.rng = Random(seed)
        self.teller = Storyteller(self.rng, words)
        self.tokenizer = tokenizer
        encoded = [e.ids for e in tokenizer.encode_batch(list(documents))]
        self.documents: list[Ids] = [ids for ids in encoded if len(ids) > 64]
        self._ends = list(accumulate(len(ids) for ids in self.documents))
        self._newline = self.encode("\n")
        self._heads = {
            role: [self.special(TURN_START), *self.encode(f"{role}\n")]
            for role in ("system", "user", "assistant")
        }

    def encode(self, text: str) -> Ids:
        ids: Ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def special(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        assert number is not None
        return number

    def passage(self, length: int) -> Ids:
        """Up to `length` consecutive tokens of a document, every token equally likely to begin."""
        at = self.rng.randrange(self._ends[-1])
        document = self.documents[bisect(self._ends, at)]
        begin = self.rng.randrange(max(1, len(document) - length))
        return document[begin : begin + length]

    def turn(self, role: str, *pieces: tuple[Ids, float]) -> Pieces:
        end = [([self.special(TURN_END)], SAID), (self._newline, MARK)]
        return [(self._heads[role], MARK), *pieces, *end]

    def exchange(self, asked: str, answer: str, weight: float = SAID) -> Pieces:
        user = self.turn("user", (self.encode(asked), ASKED))
        return user + self.turn("assistant", (self.encode(answer), weight))

    def reply_head(self) -> Ids:
        return self._heads["assistant"]

    def batch(self, size: int, length: int, span: int) -> tuple[Ints, Ints, Floats]:
        """`size` samples, each part stacked."""
        samples = [self.sample(length, span) for _ in range(size)]
        ids, positions, weights = zip(*samples, strict=True)
        return np.stack(ids), np.stack(positions), np.stack(weights)

    def sample(self, length: int, span: int) -> Sample:
        """A sequence whose positions may leave gaps up to `span`: long contexts for little work."""
        pieces: Pieces = []
        while count(pieces) < length + 1:
            pieces += self._one_kind(length + 1 - count(pieces))
        ids, weights = joined(pieces)
        return ids[: length + 1], self._positions(length, span), weights[1 : length + 1]

    def _positions(self, length: int, span: int) -> Ints:
        positions = np.arange(length + 1, dtype=np.int32)
        spare = span - (length + 1)
        if spare < 2 or self.rng.random() >= 0.6:
            return positions
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            wide = self.rng.random() < 0.6
            gap = self.rng.randrange(spare if wide else 1 + spare // 6)
            positions[self.rng.randrange(1, length) :] += gap
            spare -= gap
            if spare < 2:
                break
        return positions

    def _one_kind(self, length: int) -> Pieces:
        kind = self.rng.choices(list(MIX), list(MIX.values()))[0]
        if kind == "statements":
            return self.statements(length)
        if kind == "repeat":
            return self.repeat(length)
        if kind == "text":
            return [(self.passage(length + 2), SAID)]
        if self.rng.random() < 0.3:  # two conversations after each other
            parted = [([self.special(END_OF_TEXT)], 0.5)]
            return self.chat(length // 2) + parted + self.chat(length // 2)
        return self.chat(length)

    def chat(self, length: int) -> Pieces:
        rng, known = self.rng, dict[str, Fact]()
        pieces: Pieces = []
        if rng.random() < 0.4:
            pieces += self.turn("system", (self.encode(self.teller.system()), 0.2))
        num_facts = rng.choice((1, 2, 3, 4, 6, 8))
        while (room := length - count(pieces)) > 0:
            chance = rng.random()
            if not known or (len(known) < num_facts and chance < 0.55):
                pieces += self._telling(known)
            elif chance < 0.62 and room > 80:
                pieces += self._reading(min(room - 40, 600 if length > 600 else 140))
            elif chance < 0.68:
                pieces += self.exchange(*rng.choice(SMALL_TALK), 0.5)
            else:
                pieces += self._asking(known)
        return pieces

    def _telling(self, known: dict[str, Fact]) -> Pieces:
        facts = self.teller.facts(self.rng.choice((1, 1, 1, 2, 3, 4)))
        fresh = [fact for fact in facts if fact.subject not in known] or facts[:1]
        known |= {fact.subject: fact for fact in fresh}
        message, noted = self.teller.tell(fresh)
        user = self.turn("user", (self.encode(message), TOLD))
        return user + self.turn("assistant", (self.encode(noted), SAID))

    def _reading(self, longest: int) -> Pieces:
        passage = self.passage(self.rng.randint(24, max(25, longest)))
        if len(passage) > 90 or self.rng.random() < 0.5:
            user = self.turn("user", (self.encode(READ_THIS), ASKED), (passage, TEXT))
            return user + self.turn("assistant", (self.encode(HAVE_READ), 0.5))
        user = self.turn("user", (self.encode(REPEAT_THIS), ASKED), (passage[:50], TEXT))
        return user + self.turn("assistant", (passage[:50], COPIED))

    def _asking(self, known: dict[str, Fact]) -> Pieces:
        if self.rng.random() < 0.07:
            fact = self.teller.fact()
            if fact.subject not in known:
                return self.exchange(self.teller.ask(fact), fact.unknown())
        fact = known[self.rng.choice(list(known))]
        lead, value, rest = (self.encode(part) for part in fact.answer())
        user = self.turn("user", (self.encode(self.teller.ask(fact)), ASKED))
        return user + self.turn("assistant", (lead, SAID), (value, VALUE), (rest, SAID))

    def statements(self, length: int) -> Pieces:
        """Facts as plain sentences, a passage, then the same sentences again."""
        facts, newline = self.teller.facts(self.rng.randint(2, 8)), (self._newline, 0.2)
        pieces: Pieces = []
        for fact in facts:
            pieces += [(self.encode(f"{capital(fact.told())}."), TOLD), newline]
        room = length - count(pieces) - 16 * len(facts)
        if room > 16:
            pieces += [(self.passage(self.rng.randint(8, room)), TEXT), newline]
        while count(pieces) < length + 8:
            fact = self.rng.choice(facts)
            lead = self.encode(f"{capital(fact.subject)} is")
            value = (self.encode(f" {fact.value}"), VALUE)
            pieces += [(lead, 0.3), value, (self.encode("."), SAID), newline]
        return pieces

    def repeat(self, length: int) -> Pieces:
        """A passage, other text, the passage again."""
        passage, weight = self._to_repeat(self.rng.randint(16, max(17, length // 3)))
        pieces: Pieces = [(passage, weight)]
        while count(pieces) < length:
            between = self.rng.randint(0, max(1, length - count(pieces) - len(passage)))
            pieces += [(self.passage(between), TEXT), (self._newline, MARK)]
            pieces += [(passage[:1], MARK), (passage[1:], COPIED)]
        return pieces

    def _to_repeat(self, length: int) -> tuple[Ids, float]:
        """Text, tokens at random, or words at random, and what its first time counts."""
        rng, chance = self.rng, self.rng.random()
        if chance < 0.6:
            return self.passage(length), TEXT
        if chance < 0.8:
            size = self.tokenizer.get_vocab_size()
            return [rng.randrange(4, size) for _ in range(length)], 0.0
        words = (
            self.teller.word() if rng.random() < 0.7 else str(rng.randint(0, 9999))
            for _ in range(length // 2)
        )
        return self.encode(" ".join(words)), 0.1
