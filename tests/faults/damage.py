"""Ways for the bytes of a file to go bad."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from xxhash import xxh3_128

PAGE = 4096
Damage = Callable[[bytearray, Random], None]


def flip_bits(raw: bytearray, rng: Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 20])):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def flip_in_header(raw: bytearray, rng: Random) -> None:
    raw[rng.randrange(min(len(raw), 1024))] ^= 1 << rng.randrange(8)


def truncate(raw: bytearray, rng: Random) -> None:
    del raw[rng.choice([0, 7, 8, rng.randrange(len(raw)), len(raw) - 1]) :]


def zero_page(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(0, len(raw), PAGE)
    raw[at : at + PAGE] = bytes(len(raw[at : at + PAGE]))


def swap_pages(raw: bytearray, rng: Random) -> None:
    a, b = (rng.randrange(0, max(1, len(raw) - PAGE), PAGE) for _ in range(2))
    raw[a : a + PAGE], raw[b : b + PAGE] = raw[b : b + PAGE], raw[a : a + PAGE]


def junk_tail(raw: bytearray, rng: Random) -> None:
    raw += rng.randbytes(rng.choice([1, 64, PAGE]))


def junk(raw: bytearray, rng: Random) -> None:
    raw[:] = rng.randbytes(rng.randrange(2 * len(raw)))


def bad_length(raw: bytearray, rng: Random) -> None:
    length = int.from_bytes(raw[:8], "little")
    near = [length - 1, length + 1, length + 64, len(raw) - 8, len(raw) - 7, 1 << 20]
    far = [0, (1 << 20) + 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
    raw[:8] = rng.choice(near + far).to_bytes(8, "little")


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    3.0,
    1e300,
    10**50,
    "",
    "00",
    "ü",
    [],
    [[]],
    {},
    {"a": 1},
    "zz",
]


def hostile_header(raw: bytearray, rng: Random) -> None:
    """Well-formed in everything but one field, checksum and all; the data may be a whole other."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if rng.random() < 0.2:
        data = bytearray(rng.randbytes(len(data)))
        header["__metadata__"]["data_xxh3_128"] = xxh3_128(data).hexdigest()
    place = rng.choice([header, *header.values()])
    key = rng.choice(list(place))
    match rng.randrange(4):
        case 0:
            del place[key]
        case 1 if isinstance(place[key], list):
            place[key][rng.randrange(len(place[key]))] = rng.choice(ODD)
        case 2:
            place[key + "?"] = place.pop(key)
        case _:
            place[key] = rng.choice(ODD)
    _put_header(raw, json.dumps(header, separators=(",", ":")).encode(), bytes(data))


def hostile_json(raw: bytearray, rng: Random) -> None:
    length = int.from_bytes(raw[:8], "little")
    text = bytes(raw[8 : 8 + length])
    texts = [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"",
        b"null",
        b'{"__metadata__":[]}',
        b"1" * 100_000,
        text + text,
        text.replace(b"{", b"[", 1),
        text.replace(b'"', b"'"),
        text.decode().encode("utf-16"),
        b"\xff" * length,
        b" " * (1 << 20),
        text.replace(b'"shape"', b'"shape":[1],"shape"', 1),
    ]
    _put_header(raw, rng.choice(texts), bytes(raw[8 + length :]))


def _put_header(raw: bytearray, text: bytes, data: bytes) -> None:
    text += b" " * (-(8 + len(text)) % 64)
    raw[:] = len(text).to_bytes(8, "little") + text + data


BLOCK_FILE: list[Damage] = [
    flip_bits,
    flip_in_header,
    truncate,
    zero_page,
    swap_pages,
    junk_tail,
    junk,
    bad_length,
    hostile_header,
    hostile_json,
]
INDEX: list[Damage] = [flip_bits, flip_bits, truncate, zero_page, swap_pages, junk_tail, junk]
