"""The KV of one sequence: run + tail.

    positions  0 ........ run.length ........ length
               └─ run ──┘└────── tail ──────┘
               read-only, shared              our own, growing

A short prefix is better copied to the tail: reading two parts in each step costs more.

Recurrent layers keep states instead, as they are at `length`.  At positions that are to be marked
what they are then is kept, until somebody copies it out.

Knows how to hand out the parts of a layer and how to copy a span out as a payload.  Engine thread
only.
"""

from collections.abc import Collection, Iterator

import mlx.core as mx
import numpy as np

from agent_memory.block import BLOCK_TOKENS
from agent_memory.kv_spec import KVSpec, LayerGroup
from agent_memory.kvcache import states
from agent_memory.kvcache.packing import host
from agent_memory.kvcache.run import Run
from agent_memory.kvcache.states import States
from agent_memory.kvcache.tail import Part, Tail


class SequenceKV:
    def __init__(
        self,
        spec: KVSpec,
        run: Run | None = None,
        reserve: int = 0,
        marked_at: Collection[int] = (),
        *,
        copied: bool = False,
    ) -> None:
        """`copied`: the run's tokens are, to the tails.  `reserve`: total tokens to make room for
        at the first append.  `marked_at`: positions to be marked, beside those at regular
        distances; more may be added to it."""
        self.spec = spec
        self.run = None if copied else run
        self.length = run.length if run else 0
        self.states = list(run.states) if run else states.beginning(spec)
        self.marks: dict[int, States] = {}
        self._marked_at = marked_at
        start = self.run.length if self.run else 0
        room = max(0, reserve - start)
        self.tails = {
            layer: Tail(start, room, group.window)
            for group in spec.groups
            for layer in group.layers
        }
        if run and copied:
            for layer, tail in self.tails.items():
                tail.begin(run.parts[layer])

    @property
    def room(self) -> int:
        """Tokens the tails have places for, or will have when they are written to."""
        return min((tail.room for tail in self._growing()), default=self.length)

    @property
    def num_free(self) -> int:
        """How many more tokens that is.  Windows make room for themselves."""
        return min((t.start + t.room - self.length for t in self._growing()), default=BLOCK_TOKENS)

    def grow_to(self, num_tokens: int) -> None:
        """Places for so many in the tails, when they next need one."""
        for tail in self._growing():
            tail.reserve = num_tokens

    def _growing(self) -> Iterator[Tail]:
        return (tail for tail in self.tails.values() if tail.window is None)

    @property
    def num_to_mark(self) -> int | None:
        """Tokens from here to the next position that is to be marked, if there is one."""
        every = self.spec.checkpoint_tokens
        if not every:
            return None
        ahead = (position - self.length for position in self._marked_at)
        return min([every - self.length % every, *(count for count in ahead if count > 0)])

    def step(self, states: States) -> None:
        """What recurrent layers keep at `length`, where the step has just come to."""
        self.states = states
        every = self.spec.checkpoint_tokens
        if self.length in self._marked_at or self.length % every == 0:
            self.marks[self.length] = states

    def parts(self, layer: int) -> list[Part]:
        tail = self.tails[layer]
        own = [tail.part()] if tail.used else []
        return [self.run.parts[layer], *own] if self.run else own

    def release(self, position: int) -> None:
        """What lies before has been copied out, or will not be: windows may drop it."""
        for tail in self.tails.values():
            tail.released = max(tail.released, position)

    def has(self, lo: int, hi: int) -> bool:
        """Whether positions [lo, hi) are all here: no window has dropped any of them."""
        windows = (layer for layer, tail in self.tails.items() if tail.window is not None)
        return all(_covers(self.parts(layer), lo, hi) for layer in windows)

    def copy_out(self, lo: int, hi: int) -> np.ndarray:
        """The payload of positions [lo, hi): host bytes of their own."""
        assert 0 <= lo < hi <= self.length
        arrays: dict[str, mx.array] = {}
        for g, group in enumerate(self.spec.groups):
            arrays |= self._gather(g, group, lo, hi)
        mx.eval(list(arrays.values()))
        payload = np.empty(self.spec.payload_bytes(hi - lo), dtype=np.uint8)
        for slot in self.spec.slots(hi - lo):
            slot.view(payload)[...] = host(arrays[slot.name])
        return payload

    def _gather(self, g: int, group: LayerGroup, lo: int, hi: int) -> dict[str, mx.array]:
        """Each stored tensor of the group as [layers, heads, hi - lo, width]."""
        spans = [
            [part.cut(lo, hi) for part in self.parts(layer) if part.start < hi and part.end > lo]
            for layer in group.layers
        ]
        out: dict[str, mx.array] = {}
        for side, form in (("k", group.k), ("v", group.v)):
            for j, (name, _, _) in enumerate(form.tensors()):
                rows = [joined([getattr(part, side)[j] for part in span]) for span in spans]
                out[f"{g}.{side}.{name}"] = mx.concatenate(rows, axis=0)
        return out

    @property
    def nbytes(self) -> int:
        """Of the tails and states; a run is counted once, by whoever keeps the runs."""
        tails = sum(tail.nbytes for tail in self.tails.values())
        return tails + self.spec.state_bytes * (1 + len(self.marks))

    def check(self) -> None:
        start = self.run.length if self.run else 0
        for tail in self.tails.values():
            assert tail.end == self.length
            assert tail.start == start or tail.window is not None and start <= tail.start


def _covers(parts: list[Part], lo: int, hi: int) -> bool:
    for part in parts:
        if part.start <= lo < part.end:
            lo = part.end
    return lo >= hi


def joined(arrays: list[mx.array]) -> mx.array:
    """Along tokens."""
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=2)
