"""What a setting's text means: parsers of one text each, which raise ValueError.

Knows no setting.  Any thread.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError
        return int(text)

    return parse


def one_of(choices: Mapping[str, object]) -> Callable[[str], object]:
    def parse(text: str) -> object:
        if text not in choices:
            raise ValueError
        return choices[text]

    return parse


def words(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError
    return text


def absolute(text: str) -> Path:
    try:
        return Path(words(text)).expanduser().absolute()
    except RuntimeError as error:  # ~ of a user who has no home
        raise ValueError from error


def seconds(low: float, high: float = 3600) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not low <= float(text) <= high:
            raise ValueError
        return float(text)

    return parse


def size(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        parts = _SIZE.fullmatch(text.upper())
        if parts is None:
            raise ValueError
        num_bytes = int(parts[1]) * UNITS[parts[2]]
        if not low <= num_bytes <= high:
            raise ValueError
        return num_bytes

    return parse


def unless(word: str, parse: Callable[[str], object]) -> Callable[[str], object]:
    """`word` is None, anything else is parsed."""
    return lambda text: None if text == word else parse(text)


def pool_bytes(text: str) -> int:
    if text == "auto":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(memory // 8, 8 * UNITS["G"])
    return size(UNITS["M"], UNITS["T"])(text)
