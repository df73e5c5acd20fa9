"""Attention of a step's rows over run + tail, in the place of mlx-lm's own.

In a step every token is a row: the model sees ids of shape [rows, 1] and one position per row.
Only here rows are told apart by sequence.  Decode rows come first, one per sequence; then come
prefill chunks, several consecutive rows of one sequence each.

    rows   0   1   2 │ 3 4 5 6 7 │ 8 9
           A   B   C │  chunk D  │  E

K and V of all rows are packed first and appended to the tails; what attention then reads is what is
kept.

A decode row attends to each part by itself and the results are merged by their log-sum-exp, in
float32 whatever the model's type (as in FlashDecoding, Dao et al. 2023):

    out = sum_p w_p * out_p,   w = softmax over parts of lse_p

Decode rows that share a run attend to it together: their queries are stacked and the run is read
once, packed or, where many queries stack on a CPU, dense.

A sink, a score that every row sees and that has no value, is one more part.  A chunk reads its
parts dense and concatenated, through the fused kernel.  In a layer with a window both read only
what the rows may see.  Engine thread only.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Literal, NamedTuple

import mlx.core as mx
from mlx.nn.layers.base import Module

from agent_memory.errors import ModelRefused
from agent_memory.kv_spec import LayerGroup
from agent_memory.kvcache.packing import Packed, dense, pack, scores, weighted
from agent_memory.kvcache.run import Run
from agent_memory.kvcache.sequence_kv import SequenceKV, joined
from agent_memory.kvcache.tail import Part

Read = Literal["packed", "dense"]
Over = tuple[mx.array, mx.array]
"""Attention over one part alone [.., m, dim], and its log-sum-exp [.., m, 1]."""

ATTENTION = "scaled_dot_product_attention"
MANY_QUERIES = 16
"""From so many on a CPU is faster when it unpacks a run for all of them; measured."""


class Member(NamedTuple):
    """`num_rows` consecutive rows of a step belong to this sequence."""

    kv: SequenceKV
    num_rows: int
    num_wanted: int
    """How many of the last of them somebody reads behind the model's last layer."""


class Rows:
    """Stands where a layer's cache stands in the model, for one forward.

    It also travels as `keys` and `values`, so that attention recognizes its own calls by type, also
    in layers that borrow another layer's KV.
    """

    def __init__(
        self,
        layer: int,
        group: LayerGroup,
        members: Sequence[Member],
        offset: mx.array | int,
        read: Read,
        *,
        is_last: bool = False,
    ) -> None:
        """`is_last`: what this layer makes of rows that nobody wants need not be computed."""
        self.layer = layer
        self.is_last = is_last
        self.marker = mx.array(0)  # evaluated when what this layer writes is
        self.group = group
        self.members = members
        self.offset = offset
        self.read = read

    def make_mask(
        self,
        num_tokens: int,
        *,
        return_array: bool = False,
        window_size: int | None = None,
        **_: object,
    ) -> mx.array | Literal["causal"] | None:
        """None: which tokens a row may see is known here."""
        if window_size not in (None, self.group.window):
            raise ModelRefused(
                f"A layer of this model sees only the last {window_size} tokens, but does not keep "
                "its KV so. Choose a model with full attention."
            )
        return None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple["Rows | mx.array", "Rows | mx.array"]:
        """keys, values: [rows, kv_heads, 1, dim]; or a chunk alone, [1, kv_heads, tokens, dim]."""
        if keys.shape[2] > 1:
            keys, values = keys.transpose(2, 1, 0, 3), values.transpose(2, 1, 0, 3)
        k, v = pack(keys, self.group.k), pack(values, self.group.v)
        row = self._num_decoding
        singles = zip(*(_split(x, row) for x in k + v), strict=True)
        for (kv, _, _), own in zip(self.members, singles, strict=False):
            kv.tails[self.layer].append(own[: len(k)], own[len(k) :])
        for kv, count, _ in self.members[row:]:
            kv.tails[self.layer].append(_span(k, row, count), _span(v, row, count))
            row += count
        self.marker = keys[-1, 0, 0, :1]
        return self, self

    def keys_and_values(self) -> tuple["Rows | mx.array", "Rows | mx.array"]:
        return self, self

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None = None) -> mx.array:
        """queries [rows, heads, 1, dim], sinks [heads] -> [rows, heads, 1, v_dim]; of a chunk
        alone queries [1, heads, rows, dim], and the result likewise."""
        if queries.shape[2] > 1:
            rows = queries.transpose(2, 1, 0, 3)
            return self.attend(rows, scale, sinks).transpose(2, 1, 0, 3)
        over_runs = self._over_shared_runs(queries, scale)
        row = self._num_decoding
        out = [self._decode_rows(queries[:row], scale, sinks, over_runs)] if row else []
        for kv, count, num_wanted in self.members[row:]:
            needed = num_wanted if self.is_last else count
            if needed < count:
                out.append(mx.zeros((count - needed, *self._like(queries)), dtype=queries.dtype))
            row += count
            q = queries[row - needed : row]
            if needed == 1:
                parts, before = self._unread(kv, over_runs.get(row - 1))
                out.append(self._decode(q, parts, before, scale, sinks))
            elif needed:
                out.append(self._chunk(q, self._seen(kv, needed), scale, sinks))
        if row < queries.shape[0]:  # rows that only pad the step
            padding = queries.shape[0] - row
            out.append(mx.zeros((padding, *self._like(queries)), dtype=queries.dtype))
        return _joined(out)

    @property
    def _num_decoding(self) -> int:
        """The first members, as far as each has one row and it is needed."""
        alone = (m.num_rows == 1 and (m.num_wanted or not self.is_last) for m in self.members)
        return sum(1 for _ in takewhile(bool, alone))

    def _seen(self, kv: SequenceKV, num_rows: int) -> list[Part]:
        """What the last `num_rows` rows of a sequence may see."""
        parts = kv.parts(self.layer)
        if self.group.window is None:
            return parts
        first = kv.length - num_rows - self.group.window + 1
        return [part.cut(first, kv.length) for part in parts if part.end > first]

    def _like(self, queries: mx.array) -> tuple[int, int, int]:
        """The shape of a row's result."""
        return queries.shape[1], 1, self.group.v.dim

    def _chunk(
        self, q: mx.array, parts: list[Part], scale: float, sinks: mx.array | None
    ) -> mx.array:
        k, v = self._dense(parts)
        mask = self._mask(q.shape[0], k.shape[2])
        out = mx.fast.scaled_dot_product_attention(
            q.transpose(2, 1, 0, 3), k, v, scale=scale, mask=mask, sinks=sinks
        )
        return out.transpose(2, 1, 0, 3)

    def _mask(self, num_rows: int, num_keys: int) -> mx.array | Literal["causal"]:
        """[rows, keys]; the last key is the last row's own."""
        window = self.group.window
        if window is None or num_keys <= window:
            return "causal"
        key, row = mx.arange(num_keys), mx.arange(num_keys - num_rows, num_keys)[:, None]
        return (key <= row) & (key > row - window)

    def _decode_rows(
        self,
        queries: mx.array,
        scale: float,
        sinks: mx.array | None,
        over_runs: Mapping[int, Over],
    ) -> mx.array:
        """All of them alike, so that what can be done once for all is."""
        seen = [
            self._unread(kv, over_runs.get(row))
            for row, (kv, _, _) in enumerate(self.members[: queries.shape[0]])
        ]
        if any(self._is_fused(parts, before) for parts, before in seen):
            rows = zip(_split(queries, len(seen)), seen, strict=True)
            return _joined([self._decode(q, *own, scale, sinks) for q, own in rows])
        rows = zip(_split(self._grouped(queries, scale), len(seen)), seen, strict=True)
        sink = self._sink(sinks)
        out = _joined([self._merged(q, *own, sink) for q, own in rows])
        return out.reshape(len(seen), queries.shape[1], 1, -1)

    def _decode(
        self,
        q: mx.array,
        parts: list[Part],
        before: Over | None,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """One row [1, heads, 1, dim]."""
        if self._is_fused(parts, before):
            k, v = self._dense(parts)
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, sinks=sinks)
        out = self._merged(self._grouped(q, scale), parts, before, self._sink(sinks))
        return out.reshape(1, q.shape[1], 1, -1)

    def _is_fused(self, parts: list[Part], before: Over | None) -> bool:
        """One kernel for all of it.  On a CPU there is none, and it is put together dearly."""
        if before is not None:
            return False
        alone = len(parts) == 1 and self.group.k.bits is None
        return self.read == "dense" or (alone and not _on_cpu())

    def _unread(self, kv: SequenceKV, before: Over | None) -> tuple[list[Part], Over | None]:
        """The parts that a decode row must still attend to: all but a run that was read already."""
        return (kv.parts(self.layer)[1:] if before else self._seen(kv, 1)), before

    def _grouped(self, queries: mx.array, scale: float) -> mx.array:
        """[rows, kv_heads, query heads of one KV head, dim]"""
        rows, _, _, dim = queries.shape
        return (queries * scale).reshape(rows, self.group.kv_heads, -1, dim)

    def _sink(self, sinks: mx.array | None) -> mx.array | None:
        return None if sinks is None else sinks.reshape(1, self.group.kv_heads, -1, 1)

    def _merged(
        self, q: mx.array, parts: list[Part], before: Over | None, sink: mx.array | None
    ) -> mx.array:
        """One grouped row over each part by itself, and over what is known `before`."""
        known = [] if before is None else [before]
        return merge([*known, *(self._over(q, part) for part in parts)], sink)

    def _over_shared_runs(self, queries: mx.array, scale: float) -> dict[int, Over]:
        """By row, for decode rows whose run others of this step have too."""
        sharing: dict[int, tuple[Run, list[int]]] = {}
        row = 0
        for kv, count, num_wanted in self.members:
            row += count
            if (num_wanted if self.is_last else count) == 1 and kv.run and not self.group.window:
                sharing.setdefault(id(kv.run), (kv.run, []))[1].append(row - 1)
        over: dict[int, Over] = {}
        for run, rows in sharing.values():
            if len(rows) > 1:
                over |= self._over_run(run, rows, queries[mx.array(rows)] * scale)
        return over

    def _over_run(self, run: Run, rows: list[int], q: mx.array) -> dict[int, Over]:
        """q [rows, heads, 1, dim]"""
        n, _, _, dim = q.shape
        heads = self.group.kv_heads
        q = q.reshape(n, heads, -1, dim).transpose(1, 0, 2, 3).reshape(1, heads, -1, dim)
        out, lse = self._over(q, run.parts[self.layer])
        apart = [x.reshape(heads, n, -1, x.shape[-1]).transpose(1, 0, 2, 3) for x in (out, lse)]
        return {row: (apart[0][i : i + 1], apart[1][i : i + 1]) for i, row in enumerate(rows)}

    def _unpacked(self, part: Part, num_queries: int) -> Part:
        if self.read == "packed" and not (_on_cpu() and num_queries >= MANY_QUERIES):
            return part
        k, v = dense(part.k, self.group.k), dense(part.v, self.group.v)
        return Part(part.start, (k,), (v,))

    def _over(self, q: mx.array, part: Part) -> Over:
        """With p = softmax(s), max(p) is 1 / sum(exp(s - max(s))): no exp is computed twice."""
        part = self._unpacked(part, q.shape[2])
        s = scores(q, part.k, self.group.k).astype(mx.float32)
        p = mx.softmax(s, axis=-1)
        lse = mx.max(s, axis=-1, keepdims=True) - mx.log(mx.max(p, axis=-1, keepdims=True))
        return weighted(p.astype(q.dtype), part.v, self.group.v), lse

    def _dense(self, parts: list[Part]) -> tuple[mx.array, mx.array]:
        return (
            joined([dense(part.k, self.group.k) for part in parts]),
            joined([dense(part.v, self.group.v) for part in parts]),
        )


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _split(rows: mx.array, count: int) -> list[mx.array]:
    """The first `count` of them, each [1, ...]."""
    if count == 0:
        return []
    if rows.shape[0] > count:
        rows = rows[:count]
    return [rows] if count == 1 else list(mx.split(rows, count))


def _joined(rows: list[mx.array]) -> mx.array:
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


def _span(packed: Packed, row: int, count: int) -> Packed:
    """Rows [n, heads, 1, width] of one sequence -> [1, heads, n, width]."""
    rows = tuple(x[row : row + count] for x in packed)
    return rows if count == 1 else tuple(x.transpose(2, 1, 0, 3) for x in rows)


def merge(parts: list[Over], sink: mx.array | None = None) -> mx.array:
    """sink [.., m, 1] -> [.., m, dim]."""
    if len(parts) == 1 and sink is None:
        return parts[0][0]
    lses = [lse for _, lse in parts] + ([] if sink is None else [sink.astype(mx.float32)])
    weights = mx.softmax(mx.concatenate(lses, axis=-1), axis=-1)
    out = [o * weights[..., i : i + 1].astype(o.dtype) for i, (o, _) in enumerate(parts)]
    return sum(out[1:], start=out[0])


def install(model: Module) -> list[str]:
    """Put our dispatch into every module that defines a class of this model; returns their names.

    A model's attention may live in another model's file (qwen3_5 uses qwen3_next's), so the classes
    are asked, not the file.
    """
    names = {c.__module__ for m in model.modules() for c in type(m).__mro__}
    found = sorted(n for n in names if hasattr(sys.modules[n], ATTENTION))
    for name in found:
        original = getattr(sys.modules[name], ATTENTION)
        if not isinstance(original, Dispatch):
            setattr(sys.modules[name], ATTENTION, Dispatch(original))
    return found


class Dispatch:
    """mlx-lm's attention function, but for calls whose keys are ours."""

    def __init__(self, original: Callable[..., mx.array]) -> None:
        self.original = original

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array | Rows,
        values: mx.array | Rows,
        cache: object = None,
        scale: float = 1.0,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if not isinstance(keys, Rows):
            return self.original(
                queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
            )
        if isinstance(mask, mx.array):
            raise ModelRefused(
                "This model has attention masks of its own, which are not supported yet. "
                "Choose a model with ordinary attention."
            )
        return keys.attend(queries, scale, sinks)
