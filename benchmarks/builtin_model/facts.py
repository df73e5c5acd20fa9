"""Made-up facts and the sentences that tell them, ask for them and answer.

Knows words and phrases.  Knows nothing of tokens.  Every choice comes from the generator given, so
a seed gives the same sentences again.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

NAMES = (
    "Ada Ben Clara Dan Eva Finn Gina Hugo Iris Jack Kira Leo Mona Nils Olga Paul Quinn Rosa Sam "
    "Tara Uma Vera Wim Xena Yara Zoe Alice Bob Carol Dave Emma Frank Grace Henry Ivan Jane Karl "
    "Lucy Mark Nora Oscar Petra"
).split()
ATTRIBUTES = (
    "favorite color,favorite food,city,password,room number,lucky number,project,editor,car,team,"
    "locker,pet,hobby,street,boss,account number,badge number,desk,phone number,birthday"
).split(",")
KINDS = "code password number key value port address name color label".split()
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hello! How can I help you?"),
    ("Good morning.", "Hello! How can I help you?"),
    ("How are you?", "I am fine, thank you."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("OK.", "Good."),
)
READ_THIS, HAVE_READ, REPEAT_THIS = "Read this:\n", "I have read it.", "Repeat this:\n"
_TELL_ONE = (
    "{Fact}.",
    "{Fact}.",
    "Remember this: {fact}.",
    "Please remember that {fact}.",
    "Note: {fact}.",
    "For later: {fact}.",
)
_TELL_MANY = ("Remember these facts:", "Please remember:", "Some notes for later:")
_ASK = (
    "What is {subject}?",
    "What is {subject}?",
    "Tell me: what is {subject}?",
    "Do you remember what {subject} is?",
)


@dataclass(frozen=True, slots=True)
class Fact:
    subject: str
    """In the user's mouth: my boss.  In the assistant's, `answer_subject`: your boss."""
    answer_subject: str
    value: str

    def told(self) -> str:
        return f"{self.subject} is {self.value}"

    def answer(self) -> tuple[str, str, str]:
        """What leads to the value, the value, what follows it."""
        return f"{capital(self.answer_subject)} is", f" {self.value}", "."

    def unknown(self) -> str:
        return f"I do not know {self.answer_subject}."


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def split_words(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """The corpus's common words in two parts: nine tenths to train with, one tenth to test with."""
    counts = Counter(word for text in documents for word in re.findall(r"\b[a-z]{4,9}\b", text))
    words = sorted(word for word, n in counts.items() if n >= 3)
    Random(7).shuffle(words)
    held_out = len(words) // 10
    return words[held_out:], words[:held_out]


class Storyteller:
    """Facts and sentences out of one stock of words."""

    def __init__(self, rng: Random, words: Sequence[str]) -> None:
        self.rng = rng
        self.words = words

    def word(self) -> str:
        return self.rng.choice(self.words) if self.rng.random() < 0.75 else self._made_up_word()

    def fact(self) -> Fact:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.5:
            what = "code" if rng.random() < 0.5 else rng.choice(KINDS)
            key = self.word() if rng.random() < 0.75 else f"{self.word()} {self.word()}"
            return self._same(f"the {what} for {key}")
        if kind < 0.7:
            return self._same(f"{rng.choice(NAMES)}'s {rng.choice(ATTRIBUTES)}")
        if kind < 0.9:
            attribute = rng.choice(ATTRIBUTES)
            return Fact(f"my {attribute}", f"your {attribute}", self._value())
        return self._same(f"the {self.word()}")

    def facts(self, count: int) -> list[Fact]:
        """`count` facts about different subjects."""
        by_subject: dict[str, Fact] = {}
        while len(by_subject) < count:
            fact = self.fact()
            by_subject[fact.subject] = fact
        return list(by_subject.values())

    def tell(self, facts: Sequence[Fact]) -> tuple[str, str]:
        """What the user says, and how the assistant acknowledges it."""
        if len(facts) == 1:
            told = facts[0].told()
            message = self.rng.choice(_TELL_ONE).format(fact=told, Fact=capital(told))
            return message, f"Noted. {capital(''.join(facts[0].answer()))}"
        opening = self.rng.choice(_TELL_MANY)
        if self.rng.random() < 0.5:
            return "\n".join([opening, *(f"- {fact.told()}" for fact in facts)]), "Noted."
        return " ".join([opening, *(f"{capital(fact.told())}." for fact in facts)]), "Noted."

    def ask(self, fact: Fact) -> str:
        return self.rng.choice(_ASK).format(subject=fact.subject)

    def system(self) -> str:
        name = self.rng.choice(NAMES)
        return self.rng.choice(
            (
                f"You are {name}, a helpful assistant.",
                f"You are agent {name}.",
                "You are a helpful assistant.",
            )
        )

    def phrases(self) -> str:
        """A bit of everything said in chats, for a tokenizer to learn."""
        lines = ["user", "assistant", self.system(), READ_THIS, HAVE_READ, REPEAT_THIS]
        for fact in self.facts(4):
            lines += [*self.tell([fact]), self.ask(fact), "".join(fact.answer()), fact.unknown()]
            lines += self.rng.choice(SMALL_TALK)
        return "\n".join([*lines, *self.tell(self.facts(2))])

    def _same(self, subject: str) -> Fact:
        return Fact(subject, subject, self._value())

    def _value(self) -> str:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.55:
            return "".join(rng.choice("0123456789") for _ in range(rng.choice((3, 4, 4, 4, 5, 6))))
        if kind < 0.80:
            return self.word()
        if kind < 0.90:
            return f"{self.word()} {self.word()}"
        return f"{self.word()}-{rng.randint(10, 99)}"

    def _made_up_word(self) -> str:
        rng = self.rng
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        return "".join(list(syllables)[: rng.randint(2, 3)]) + rng.choice(("", "n", "r", "x", "s"))
