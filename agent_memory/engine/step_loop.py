"""What the engine thread does with one loaded model, turn after turn.

    a turn    admit and restore  ·  launch the next step  ·  settle the one before

A step is launched before the tokens of the last one are read: while the device computes, Python
prepares.  So a sequence that turns out to have ended is in one more step, which computed the KV of
its last token and sampled one that nobody takes.  A step with a first token in it is settled before
the next is launched: who has waited longest does not wait for that too.

Where a token's choice depends on the one before it, by a grammar or a penalty, only the forward of
a step is launched first; then the step before is settled, and then the tokens are drawn.

A step that raises ends at most one request.  Everyone in it is accused: rewound to what was
committed and computed once alone; who raises alone is at fault.  Those who were only in the step
behind it are rewound, not accused.

Who is sent back to wait, for want of room, has the step under way settled first: nothing of it is
lost, what was computed is committed, and its answer goes on where it stopped.  Engine thread only.
"""

import secrets
import time

import mlx.core as mx
import structlog

from agent_memory.block import root_of
from agent_memory.engine.drawing import Flight, Piece, draw
from agent_memory.engine.ledger import Ledger
from agent_memory.engine.mailbox import Mailbox, Stream
from agent_memory.engine.memory import Memory
from agent_memory.engine.restore import Restored
from agent_memory.engine.room import Cost, Room
from agent_memory.engine.scheduler import Scheduler, Work
from agent_memory.engine.sequence import Sequence, State
from agent_memory.errors import EngineFailed, MemoryExceeded, RequestError
from agent_memory.metrics import Metrics
from agent_memory.model.grammar import Constraint
from agent_memory.model.loader import LoadedModel
from agent_memory.model.runner import Job
from agent_memory.model.sampler import draw_for
from agent_memory.request import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Scored,
    Started,
    TokenLogprob,
)

RESTORE_BYTES_PER_TURN = 64 << 20
MAX_ACCUSATIONS = 3

log = structlog.get_logger(__name__)


class StepLoop:
    def __init__(
        self,
        loaded: LoadedModel,
        memory: Memory,
        scheduler: Scheduler,
        ledger: Ledger,
        cost: Cost,
        mailbox: Mailbox,
        metrics: Metrics,
    ) -> None:
        self.loaded = loaded
        self.memory = memory
        self.scheduler = scheduler
        self.room = Room(
            ledger,
            cost,
            scheduler,
            memory.pool,
            needs=memory.needs,
            runs=lambda: memory.run_bytes,
            preempt=self._preempt,
            model=loaded.id,
        )
        self._mailbox = mailbox
        self._metrics = metrics
        self._flight: Flight | None = None
        self._submitted: dict[Sequence, float] = {}  # until the first token, for its time
        self._in_vain = False  # nobody who waits could begin, and nothing has changed since

    # ── requests come and go ─────────────────────────────────────────────────────────────────

    def submit(
        self, request: GenerateRequest, stream: Stream, constraint: Constraint | None = None
    ) -> None:
        """The request has been validated: its prompt fits and its parameters are in range."""
        room = self.loaded.context_length - len(request.prompt)
        seed = request.sampling.seed
        seq = Sequence(
            request,
            root_of(self.memory.spec.fingerprint, request.tenant),
            stream,
            max_new=min(request.max_tokens or room, room),
            draw=draw_for(
                request.sampling,
                secrets.randbits(63) if seed is None else seed,
                self.loaded.proven.vocab_size,
            ),
            end_of_turn=self.loaded.tokenizer.end_of_turn,
            text=self.loaded.tokenizer.stream(),
            constraint=constraint,
        )
        self._submitted[seq] = time.monotonic()
        self._metrics.prompt_tokens.inc(seq.num_prompt)
        self.scheduler.add(seq)

    def cancel(self, request_id: str) -> None:
        for seq in list(self.scheduler):
            if seq.request.id == request_id:
                self._finish(seq, FinishReason.CANCELLED)

    def end_waiting(self) -> int:
        """Those that never began get their last event now; those sent back to wait still go on."""
        new = [seq for seq in self.scheduler.waiting if not seq.started]
        for seq in new:
            self._finish(seq, FinishReason.SHUTDOWN)
        return len(new)

    def end_all(self) -> int:
        """Every request gets its last event now, and what was computed of it is committed."""
        left = list(self.scheduler)
        for seq in left:
            self._finish(seq, FinishReason.SHUTDOWN)
        self._flight = None
        self._mailbox.flush()
        return len(left)

    def fail_all(self) -> None:
        """After a fault that no single request explains: each gets its last event, none goes on."""
        for seq in list(self.scheduler):
            self._fail(seq)
        self._flight = None
        self._mailbox.flush()

    # ── a turn ───────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        """False: nothing changes until a command comes (a request, or a block from the disk)."""
        return (
            self._flight is not None
            or (self.scheduler.can_admit and not self._in_vain)
            or self.memory.can_advance
            or any(seq.state is State.RUNNING for seq in self.scheduler.admitted)
        )

    @property
    def is_quiet(self) -> bool:
        """Nothing is under way, nor will anything come of what was asked for."""
        return self._flight is None and not len(self.scheduler) and self.memory.is_quiet

    def something_changed(self) -> None:
        """A command was run: who could not begin before perhaps can now."""
        self._in_vain = False

    def turn(self) -> None:
        under_way = self._flight is not None
        self._admit()
        ready = self.memory.advance(RESTORE_BYTES_PER_TURN)
        for restored in ready:
            self._begin(restored)
        self._mailbox.flush()  # their answers' heads are made while the step is computed
        self._grow()
        if self._flight is not None and self._flight.has_first_token:
            self._settle_flight()
            self._mailbox.flush()
        work = self.scheduler.next_step()
        launched = self._launch(work) if work else None
        last, self._flight = self._flight, launched
        self._in_vain = not (under_way or ready or work)
        if last is not None and not self._settle(last) and launched is not None:
            self._rewind(launched.seqs)
            self._flight = None
        self._mailbox.flush()

    def _admit(self) -> None:
        while seq := self.scheduler.admit(self.memory.remembered, self.room.admits):
            if self.room.is_too_long(seq):
                self._end_too_long(seq)
                continue
            try:
                self._offer_what_is_shared(seq)
                restored = self.memory.begin(seq)
            except Exception as error:  # such as no memory for its run: its own fault
                self._log_failure([seq], error)
                self._fail(seq)
            else:
                self.room.hold(seq, self.memory.own_tokens(seq))
                if restored:
                    self._begin(restored)
        self.room.level()

    def _end_too_long(self, seq: Sequence) -> None:
        """One that never began was not too long when it came: another model has its room now."""
        if seq.started:
            self._finish(seq, FinishReason.LENGTH)
        else:
            self._fail(seq, MemoryExceeded(seq.num_prompt, len(seq.tokens) + 1, seq.reserve))

    def _grow(self) -> None:
        """Who has no place for the next token gets more room, or goes back to wait for it."""
        for seq in self.room.short():
            if seq.state is State.RUNNING and not self.room.grow(seq):
                self._preempt(seq)
        for seq in self.room.outgrown():
            self._preempt(seq)
            if not self.room.outgrown():
                break

    def _preempt(self, seq: Sequence) -> None:
        """Back to waiting.  It may turn out to have ended."""
        self._settle_flight()
        if seq.state is not State.RUNNING:
            return
        try:
            self.memory.commits.park(seq)
        except Exception:  # then it is computed again
            log.exception("commit_failed", request_id=seq.request.id)
        seq.rewind()
        self.scheduler.readmit(seq)
        self.room.release(seq)
        self._metrics.preemptions.inc()
        log.info("sent_back_to_wait", request_id=seq.request.id, tokens=len(seq.tokens))

    def _offer_what_is_shared(self, seq: Sequence) -> None:
        """What a running sequence has computed of this prompt is matched like all that is known."""
        if shared := self.scheduler.shared_with(seq):
            try:
                self.memory.commits.offer(*shared)
            except Exception:  # nothing of it is this sequence's fault: it computes for itself
                log.exception("offer_failed", request_id=shared.seq.request.id)

    def _begin(self, restored: Restored) -> None:
        seq, restore_s = restored.seq, time.monotonic() - restored.seq.looked_at
        self.room.hold(seq, self.memory.own_tokens(seq))
        if seq.started:
            return  # it was rewound; what it is told it was told
        seq.started = True
        cached = restored.from_memory + restored.from_disk
        self._metrics.cached_tokens.labels("memory").inc(restored.from_memory)
        self._metrics.cached_tokens.labels("disk").inc(restored.from_disk)
        assert seq.compared is not None
        tiers = restored.from_memory, restored.from_disk
        self._emit(seq, Started(seq.num_prompt, cached, *tiers, restore_s, seq.compared))

    def _launch(self, work: list[Work]) -> Flight | None:
        seqs = [w.seq for w in work]
        try:
            pieces = [Piece.of(w) for w in work]
            logits = self.loaded.runner.forward([self._job(piece) for piece in pieces])
            if any(piece.follows for piece in pieces):
                mx.async_eval(logits)
                if not self._settle_flight():
                    self._rewind(seqs)
                    return None
            flight = draw(logits, pieces, self._fail)
            flight.send()
        except Exception as error:
            self._accuse(seqs, error)
            return None
        self._metrics.steps.inc()
        for seq in flight.rows:
            seq.in_flight += 1
        return flight

    def _job(self, piece: Piece) -> Job:
        """The rows' token ids; a decode row's may still be on its way out of the last step."""
        seq, start = piece.seq, piece.start
        assert seq.kv is not None
        if start < len(seq.tokens):
            return Job(seq.kv, seq.tokens[start : start + piece.num_tokens], piece.num_logits)
        assert self._flight is not None and piece.num_tokens == 1
        row = self._flight.rows[seq]
        return Job(seq.kv, self._flight.tokens[row : row + 1], piece.num_logits)

    def _settle_flight(self) -> bool:
        """The step under way, if there is one."""
        last, self._flight = self._flight, None
        return last is None or self._settle(last)

    def _settle(self, flight: Flight) -> bool:
        """Read the sampled tokens and pass them on; False if the step turns out to have failed."""
        try:
            settled = flight.read()
            for seq, first, logprobs in settled.prompts:
                if seq.state is State.RUNNING:
                    self._tell_scores(seq, first, logprobs)
            for seq in flight.seqs:
                if seq.state is State.RUNNING:
                    seq.alone = False
                    self._advance(seq, settled.tokens.get(seq), settled.logprobs.get(seq))
        except Exception as error:
            self._accuse(flight.seqs, error)
            return False
        return True

    def _tell_scores(self, seq: Sequence, first: int, logprobs: list[TokenLogprob]) -> None:
        """Of the prompt from `first` on; what was told before it was rewound is not told again."""
        assert first <= seq.num_scored
        if new := logprobs[seq.num_scored - first :]:
            seq.num_scored += len(new)
            self._emit(seq, Scored(tuple(new)))

    def _advance(self, seq: Sequence, token: int | None, logprob: TokenLogprob | None) -> None:
        if token is not None:
            text = seq.accept(token)
            self._metrics.generated_tokens.inc()
            if submitted := self._submitted.pop(seq, None):
                self._metrics.time_to_first_token.observe(time.monotonic() - submitted)
            logprobs = (logprob,) if logprob and not seq.ends(token) else ()
            if text or logprobs:
                self._emit(seq, Delta(text, seq.num_generated, logprobs))
            if seq.finish_reason:
                self._finish(seq, seq.finish_reason)
                return
        self.memory.commits.full(seq)

    # ── endings ──────────────────────────────────────────────────────────────────────────────

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Told first, then remembered: nobody waits for the copy."""
        self._emit(seq, Finished(reason, seq.num_generated, seq.stop.hit))
        self._mailbox.flush()
        self._leave(seq, reason)
        try:
            self.memory.commits.turn(seq)
        except Exception:
            log.exception("commit_failed", request_id=seq.request.id)
        seq.kv = None

    def _leave(self, seq: Sequence, reason: str) -> None:
        self.memory.forget_restores(seq)
        self.scheduler.remove(seq)
        self.room.release(seq)
        self._submitted.pop(seq, None)
        seq.move(State.FINISHED)
        self._metrics.requests.labels(reason).inc()

    def _accuse(self, seqs: list[Sequence], error: Exception) -> None:
        self._metrics.step_failures.inc()
        running = [seq for seq in seqs if seq.state is State.RUNNING]
        self._log_failure(running, error)
        for seq in running:
            seq.accusations += 1
            if len(running) == 1 or seq.accusations >= MAX_ACCUSATIONS:
                self._fail(seq)
            else:
                seq.alone = True
        if len(running) == 1:
            for seq in self.scheduler:  # who was accused with it is cleared
                seq.accusations = 0
        self._rewind(running)

    def _log_failure(self, seqs: list[Sequence], error: Exception) -> None:
        log.error("step_failed", request_ids=[s.request.id for s in seqs], exc_info=error)

    def _rewind(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            if seq.state is State.RUNNING:
                seq.rewind()
                seq.put_back = True
                self.scheduler.readmit(seq)
                self.room.release(seq)

    def _fail(self, seq: Sequence, error: RequestError | None = None) -> None:
        unexplained = EngineFailed(
            "Computing this request failed; the server goes on. The log names the error "
            f"under request id {seq.request.id}."
        )
        self._emit(seq, Failed(error or unexplained))
        self._leave(seq, "failed")
        seq.kv = None
        try:
            self.memory.commits.own(seq)
        except Exception:
            log.exception("commit_failed", request_id=seq.request.id)

    def _emit(self, seq: Sequence, event: Event) -> None:
        self._mailbox.emit(seq.stream, event)

    def check(self) -> None:
        self.scheduler.check()
        self.memory.check()
        self.room.check()
        for seq in self.scheduler:
            seq.check()
