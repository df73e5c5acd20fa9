"""Runs steps: rows of many sequences through the model in one forward.  Its only caller.

Knows rows, positions and logits.  Knows nothing of requests, text or why a sequence is in a step.
Engine thread only.

    jobs    A: 1 token   B: 1 token   C: 5 tokens of its prompt    (decode rows first)
    model   ids [7, 1], positions [7] -> hidden [7, 1, h] -> head on the wanted rows only
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear

from agent_memory.kv_spec import KVSpec, LayerGroup
from agent_memory.kvcache.attention import Member, Read, Rows
from agent_memory.kvcache.handed import Handed
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.kvcache.states import Carried
from agent_memory.model import caches


@dataclass(slots=True)
class Job:
    """One sequence's rows in a step: `tokens` are ids, or a [1] array still being computed.

    The logits of the last `num_logits` of them are wanted.
    """

    kv: SequenceKV
    tokens: Sequence[int] | mx.array
    num_logits: int = 1

    @property
    def count(self) -> int:
        return self.tokens.size if isinstance(self.tokens, mx.array) else len(self.tokens)


Mode = Literal["mixed", "split", "handed"]
Pick = Callable[[mx.array], mx.array]
"""The wanted rows of what a model's trunk, or its head, returns."""


class HeadCut:
    """Lets a model's trunk return only the rows whose logits are wanted.

    mlx-lm models compute trunk, then head; without this the head, up to a fifth of a small model's
    work, would run on every prompt row.  The trunk's class is replaced by a subclass that gathers.
    """

    def __init__(self, model: Module) -> None:
        self.pick: Pick | None = None
        trunk = getattr(getattr(model, "language_model", model), "model", None)
        self.works = isinstance(trunk, Module)
        if isinstance(trunk, Module):
            trunk.__class__ = self._subclass(type(trunk))

    def _subclass(self, base: type[Module]) -> type[Module]:
        def call(trunk: Module, *args: object, **kwargs: object) -> mx.array:
            hidden: mx.array = base.__call__(trunk, *args, **kwargs)
            return hidden if self.pick is None else self.pick(hidden)

        return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


class Runner:
    """`mode`: "mixed", all rows of a step go through the model together; "split", decode rows
    together and each chunk by itself, for recurrent layers know rows of one sequence only as a
    chunk; "handed", the same with dense K and V."""

    def __init__(
        self,
        model: Module,
        spec: KVSpec,
        head: HeadCut,
        read: Read,
        mode: Mode = "mixed",
        min_rows: int = 1,
    ) -> None:
        """Mixed steps of fewer than `min_rows` are padded with rows that belong to nobody."""
        self.model = model
        self.spec = spec
        self.read = read
        self.mode = mode
        self.min_rows = min_rows
        self._head = head
        layers = [(layer, group) for group in spec.groups for layer in group.layers]
        self.layers: list[tuple[int, LayerGroup]] = sorted(layers, key=lambda pair: pair[0])
        self._recurrent = sorted({form.layer for form in spec.states})
        known = sorted([layer for layer, _ in self.layers] + self._recurrent)
        assert known == list(range(len(known)))
        self._counts = caches.counts(model)
        # Where layers behind the last one with KV of its own borrow another's, all rows go through.
        self._last = len(layers) - 1 if len(model.layers) == len(layers) else None

    def forward(self, jobs: Sequence[Job]) -> mx.array:
        """One step -> the wanted logits [rows, vocab] in the order of the jobs, not evaluated.

        Where none are wanted a marker comes back instead, which is evaluated when the step's KV is,
        and the KV itself has been sent on its way: the rest of the last layer is never computed.
        """
        jobs = list(jobs)
        together = [jobs] if self.mode == "mixed" else _apart(jobs)
        done = [self._rows(js) if self.mode == "mixed" else self._alike(js) for js in together]
        wanted: list[mx.array] = []
        for out, js in zip(done, together, strict=True):
            if any(job.num_logits for job in js):
                wanted.append(out)
            else:
                _send(js, out)
        if not wanted:
            return done[-1]
        return wanted[0] if len(wanted) == 1 else mx.concatenate(wanted)

    def _rows(self, jobs: list[Job]) -> mx.array:
        positions, wanted = self._place(jobs)
        padding = max(0, self.min_rows - len(positions))
        offset = mx.array(positions + [0] * padding)
        rows = [
            Rows(layer, group, _members(jobs), offset, self.read, is_last=layer == self._last)
            for layer, group in self.layers
        ]
        chosen = mx.array(wanted)
        cache = caches.nested(rows, self._counts)
        out = self._through(_ids(jobs, padding)[:, None], cache, lambda x: x[chosen], bool(wanted))
        return rows[-1].marker if out is None else out

    def _alike(self, jobs: list[Job]) -> mx.array:
        """Decode rows, or one chunk."""
        positions, wanted = self._place(jobs)
        chunk = jobs[0].count > 1
        offset = positions[0] if chunk else mx.array(positions)
        kind = Handed if self.mode == "handed" else Rows
        rows = {
            layer: kind(layer, group, _members(jobs), offset, self.read)
            for layer, group in self.layers
        }
        carried = self._carried(jobs)
        leaves: dict[int, Rows | Carried] = rows | carried
        cache = caches.nested([leaves[i] for i in range(len(leaves))], self._counts)
        chosen = mx.array(wanted)
        ids = _ids(jobs, 0)
        if chunk:
            out = self._through(ids[None], cache, lambda x: x[0, chosen][:, None], bool(wanted))
        else:
            out = self._through(ids[:, None], cache, lambda x: x[chosen], bool(wanted))
        self._hand_back(jobs, carried)
        return rows[self.layers[-1][0]].marker if out is None else out

    def _carried(self, jobs: list[Job]) -> dict[int, Carried]:
        """The states of all jobs, by layer."""
        arrays: dict[int, list[mx.array]] = {layer: [] for layer in self._recurrent}
        for i, form in enumerate(self.spec.states):
            arrays[form.layer].append(_joined([job.kv.states[i] for job in jobs]))
        return {layer: Carried(own) for layer, own in arrays.items()}

    def _hand_back(self, jobs: list[Job], carried: dict[int, Carried]) -> None:
        if not carried:
            return
        whole = [array for layer in self._recurrent for array in carried[layer].arrays]
        for n, job in enumerate(jobs):
            job.kv.step([array[n : n + 1] for array in whole] if len(jobs) > 1 else whole)

    def _through(self, ids: mx.array, cache: object, pick: Pick, wants: bool) -> mx.array | None:
        """-> logits [wanted, vocab]; None if none are."""
        self._head.pick = pick if wants and self._head.works else None
        try:
            out: mx.array = self.model(ids, cache=cache)
        finally:
            self._head.pick = None
        if not wants:
            return None
        return (out if self._head.works else pick(out))[:, -1]

    def _place(self, jobs: list[Job]) -> tuple[list[int], list[int]]:
        """Advance every sequence -> (position of each row, rows whose logits are wanted)."""
        positions: list[int] = []
        wanted: list[int] = []
        for job in jobs:
            start, job.kv.length = job.kv.length, job.kv.length + job.count
            positions.extend(range(start, job.kv.length))
            wanted.extend(range(len(positions) - job.num_logits, len(positions)))
        return positions, wanted


def _members(jobs: list[Job]) -> list[Member]:
    return [Member(job.kv, job.count, job.num_logits) for job in jobs]


def _apart(jobs: list[Job]) -> list[list[Job]]:
    """Decode rows that come together stay together, each chunk is by itself."""
    apart: list[list[Job]] = []
    for job in jobs:
        if apart and job.count == 1 == apart[-1][-1].count:
            apart[-1].append(job)
        else:
            apart.append([job])
    return apart


def _send(jobs: list[Job], marker: mx.array) -> None:
    """Begin to compute the KV and states that these have written, and the marker of their end."""
    tails = [tail.arrays for job in jobs for tail in job.kv.tails.values()]
    mx.async_eval(marker, tails, [job.kv.states for job in jobs])


def _joined(rows: list[mx.array]) -> mx.array:
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


def _ids(jobs: list[Job], padding: int) -> mx.array:
    parts = [j.tokens if isinstance(j.tokens, mx.array) else mx.array(list(j.tokens)) for j in jobs]
    if padding:
        parts.append(mx.zeros(padding, dtype=parts[0].dtype))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def rows_for_one_rounding(model: Module, spec: KVSpec) -> int:
    """The least rows for which a CPU's matrix products round as they do for many.

    OpenBLAS computes results of at most 1,200 numbers by other kernels, whose last bits differ; in
    quantized KV such a bit now and then moves a number into the next bucket, which changes what
    follows.  Models worth running are wider: only tiny ones are padded, and none on a GPU.
    """
    quantized = any(g.k.bits or g.v.bits for g in spec.groups)
    if mx.default_device().type != mx.DeviceType.cpu or not quantized:
        return 1
    widths = [m.weight.shape[0] for m in model.modules() if type(m) is Linear]
    return 1200 // min(widths) + 1 if widths else 1
