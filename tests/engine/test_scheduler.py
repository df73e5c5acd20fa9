"""The policy of a step, and the states of a sequence, without MLX or time."""

from itertools import count, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.block import root_of
from agent_memory.engine.mailbox import Stream
from agent_memory.engine.scheduler import MIN_SHARED, PROMOTE_ROWS, Scheduler
from agent_memory.engine.sequence import TRANSITIONS, Sequence, State
from agent_memory.engine.shares import TURN_ROWS, Shares
from agent_memory.kv_spec import KVSpec, LayerGroup, TensorFormat
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.sampler import Draw
from agent_memory.request import GenerateRequest, Priority, SamplingParams
from tests.conftest import builtin_model

FORM = TensorFormat(64, "F32")
SPEC = KVSpec((LayerGroup("full", (0,), 1, FORM, FORM),), "digest")
END_OF_TURN = 2
STARTS = count(5, 10_000)
INTERACTIVE, BACKGROUND = Priority.INTERACTIVE, Priority.BACKGROUND


def sequence(num_prompt: int, max_new: int = 100, first: int = 5) -> Sequence:
    return of_prompt(tuple(range(first, first + num_prompt)), max_new)


def of_prompt(
    prompt: tuple[int, ...],
    max_new: int = 100,
    agent: str | None = None,
    priority: Priority = Priority.INTERACTIVE,
    tenant: str | None = None,
) -> Sequence:
    return Sequence(
        GenerateRequest("r", agent, prompt, SamplingParams(), priority=priority),
        root_of(SPEC.fingerprint, tenant),
        Stream(),
        max_new,
        lambda _position: Draw(None, 0),
        frozenset({END_OF_TURN}),
        builtin_model(None).tokenizer.stream(),
    )


def nothing(_seq: Sequence) -> int:
    """What is remembered of a sequence."""
    return 0


def room(_seq: Sequence) -> bool:
    """Whether its KV fits."""
    return True


def started(num_prompt: int, computed: int = 0, max_new: int = 100) -> Sequence:
    seq = sequence(num_prompt, max_new)
    seq.move(State.RUNNING)
    seq.kv = SequenceKV(SPEC)
    seq.kv.length = computed
    return seq


@pytest.mark.parametrize(("before", "after"), list(product(State, State)))
def test_only_what_the_table_allows(before: State, after: State) -> None:
    seq = sequence(3)
    seq.state = before
    if after in TRANSITIONS[before]:
        seq.move(after)
        assert seq.state is after
    else:
        with pytest.raises(AssertionError):
            seq.move(after)


def test_a_sequence_counts_what_is_known_and_what_is_on_its_way() -> None:
    seq = started(4, computed=4, max_new=2)
    assert (seq.to_compute, seq.num_kept) == (0, 4)
    seq.in_flight = 1
    assert seq.to_compute == 1
    seq.accept(9)
    assert (seq.num_generated, seq.to_compute, seq.finish_reason) == (1, 1, None)
    seq.in_flight = 1
    assert seq.to_compute == 0  # with that one max_new is reached
    seq.accept(END_OF_TURN)
    assert seq.finish_reason == "stop"


def test_rewinding_forgets_what_was_computed_and_not_what_is_known() -> None:
    seq = started(4, computed=4)
    seq.in_flight = 1
    seq.accept(9)
    seq.rewind()
    assert seq.state is State.WAITING and seq.tokens == [5, 6, 7, 8, 9]
    assert seq.kv is None and seq.in_flight == 0 and not seq.chain


lengths = st.lists(st.tuples(st.integers(1, 600), st.booleans()), max_size=20)


@given(lengths, st.integers(1, 300), st.integers(1, 12))
def test_a_step_keeps_its_budget_and_leaves_nothing_undone(
    wanted: list[tuple[int, bool]], step_tokens: int, max_running: int
) -> None:
    scheduler = Scheduler(step_tokens, max_running)
    for num_prompt, decodes in wanted:
        scheduler.add(sequence(num_prompt, first=1000 * len(scheduler)))
        if seq := scheduler.admit(nothing, room):
            seq.move(State.RUNNING)
            seq.kv = SequenceKV(SPEC)
            if decodes:
                seq.kv.length, seq.in_flight = num_prompt, 1
    scheduler.check()
    step = scheduler.next_step()
    rows = sum(work.num_tokens for work in step)
    undone = sum(seq.to_compute for seq in scheduler.admitted)
    assert rows == min(step_tokens, undone)  # never more than the budget, never less than there is
    assert len({id(work.seq) for work in step}) == len(step)
    decoding = [work.seq.to_compute == 1 for work in step]
    assert decoding == sorted(decoding, reverse=True)
    for work in step:
        assert work.samples == (work.num_tokens == work.seq.to_compute)
    arrivals = [scheduler.admitted.index(w.seq) for w in step if w.seq.to_compute > 1]
    assert arrivals == sorted(arrivals)


def test_admission_is_bounded_and_in_order_and_the_accused_computes_alone() -> None:
    scheduler = Scheduler(256, 2)
    seqs = [sequence(10) for _ in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    assert [scheduler.admit(nothing, room) for _ in range(3)] == [*seqs[:2], None]
    for seq in seqs[:2]:
        seq.move(State.RUNNING)
        seq.kv = SequenceKV(SPEC)
    assert len(scheduler.next_step()) == 2
    seqs[1].alone = True
    assert [work.seq for work in scheduler.next_step()] == [seqs[1]]
    seqs[0].rewind()
    scheduler.readmit(seqs[0])
    scheduler.remove(seqs[1])
    assert scheduler.admit(nothing, room) is seqs[0]  # before those that never ran


def of_agent(agent: str, num_prompt: int, priority: Priority = INTERACTIVE) -> Sequence:
    """A prompt that begins like no other."""
    start = next(STARTS)
    return of_prompt(tuple(range(start, start + num_prompt)), agent=agent, priority=priority)


def run(seq: Sequence) -> None:
    seq.move(State.RUNNING)
    seq.kv = SequenceKV(SPEC)


def compute(scheduler: Scheduler) -> dict[str | None, int]:
    """One step, of which nothing ends -> rows by agent."""
    rows: dict[str | None, int] = {}
    for seq, num_tokens, _ in scheduler.next_step():
        assert seq.kv is not None
        seq.kv.length += num_tokens
        agent = seq.request.agent
        rows[agent] = rows.get(agent, 0) + num_tokens
    return rows


def test_interactive_before_background_and_agents_in_turn() -> None:
    scheduler = Scheduler(256, 8)
    night = of_agent("night", 600, BACKGROUND)
    greedy = [of_agent("greedy", 2 * TURN_ROWS) for _ in range(3)]
    modest = of_agent("modest", 600)
    for seq in (night, *greedy, modest):
        scheduler.add(seq)
    order = [scheduler.admit(nothing, room) for _ in range(5)]
    assert order == [*greedy, modest, night]  # nobody was given anything yet
    for seq in (night, *greedy, modest):
        run(seq)
    agents = []
    for _ in range(15):
        agents += list(compute(scheduler))
        scheduler.check()
    turn = TURN_ROWS // 256
    assert agents[: turn + 1] == ["greedy"] * turn + ["modest"]
    assert agents[turn : turn + 3] == ["modest"] * 3  # before the rest of the greedy one's
    assert "night" not in agents


def test_who_was_away_has_saved_nothing_and_who_had_more_waits_a_bounded_time() -> None:
    shares = Shares()
    for agent in ("a", "b"):
        shares.come(agent)
    shares.give("a", 10 * TURN_ROWS)
    shares.come("c")
    assert [shares.turn(agent) for agent in "abc"] == [10, 0, 5]
    shares.leave("a")
    shares.come("a")
    assert shares.turn("a") == 10  # going and coming back clears nothing
    for _ in range(3 * 5 + 1):
        shares.leave("c")
        shares.come("c")  # a newcomer each time
        shares.give("c", TURN_ROWS)
    shares.come("new")
    assert shares.turn("new") >= shares.turn("a")
    for agent in ("a", "b", "c", "new"):
        shares.leave(agent)
    shares.check()


def test_background_work_is_passed_over_for_a_bounded_time_only() -> None:
    scheduler = Scheduler(256, 4)
    nights = [of_agent("night", 300, BACKGROUND) for _ in range(2)]
    for seq in nights:
        scheduler.add(seq)
    rows = 0
    while not nights[0].urgent:
        day = of_agent(f"day-{rows}", 256)
        scheduler.add(day)
        assert scheduler.admit(nothing, room) is day
        run(day)
        rows += sum(compute(scheduler).values())
        scheduler.remove(day)
        assert rows <= PROMOTE_ROWS + 512
    assert not nights[1].urgent  # one at a time
    assert scheduler.admit(nothing, room) is nights[0]


def test_who_yields_to_whom() -> None:
    scheduler = Scheduler(256, 3)
    seqs = [of_agent(str(n), 300, BACKGROUND) for n in range(2)] + [of_agent("2", 300)]
    for seq in seqs:
        scheduler.add(seq)
        assert scheduler.admit(nothing, room) is seq
        run(seq)
    first, second, urgent = seqs
    new, patient = of_agent("3", 300), of_agent("4", 300, BACKGROUND)
    assert scheduler.yielding_to(patient) == []
    assert scheduler.yielding_to(new) == [second, first]
    scheduler.add(patient)
    assert not scheduler.can_admit
    scheduler.add(new)
    assert scheduler.can_admit and scheduler.admit(nothing, room) is None
    asked = []

    def make_room(seq: Sequence) -> bool:
        asked.append(seq)
        second.rewind()
        scheduler.readmit(second)
        return True

    assert scheduler.admit(nothing, make_room) is new and asked == [new]
    run(new)
    assert scheduler.yielding_to(first) == []
    assert scheduler.yielding_to(urgent) == [first, new]  # of the interactive what is younger
    assert scheduler.yielding_to(new) == [first]


COMMON = tuple(range(5, 505))


def one_computing(num_computed: int) -> tuple[Scheduler, Sequence]:
    """A scheduler with one running sequence, whose prompt is COMMON and 100 tokens more."""
    scheduler = Scheduler(256, 8)
    first = of_prompt(COMMON + tuple(range(2000, 2100)))
    scheduler.add(first)
    assert scheduler.admit(nothing, room) is first
    first.move(State.RUNNING)
    first.kv = SequenceKV(SPEC)
    first.kv.length = num_computed
    return scheduler, first


def test_what_is_being_computed_is_waited_for_and_others_pass_by() -> None:
    scheduler, first = one_computing(499)
    same, other = of_prompt((*COMMON, 3000)), of_prompt(COMMON[:63] + (3000,) * 500)
    scheduler.add(same)
    scheduler.add(other)
    assert scheduler.admit(nothing, room) is other
    assert scheduler.admit(nothing, room) is None
    assert first.kv is not None
    first.kv.length = 500
    assert scheduler.admit(nothing, room) is same
    assert scheduler.shared_with(same) == (first, 500)


@pytest.mark.requirement("S-09")
def test_of_what_another_tenant_computes_nobody_knows() -> None:
    scheduler, _ = one_computing(300)
    same, stranger = of_prompt((*COMMON, 3000)), of_prompt((*COMMON, 3000), tenant="acme")
    scheduler.add(same)
    scheduler.add(stranger)
    assert scheduler.shared_with(stranger) is None
    assert scheduler.admit(nothing, room) is stranger and stranger.awaits is None
    assert scheduler.admit(nothing, room) is None and same.awaits is not None


def test_what_is_remembered_anyway_is_not_waited_for() -> None:
    scheduler, _ = one_computing(300)
    scheduler.add(of_prompt((*COMMON, 3000)))
    assert scheduler.admit(lambda _: 500 - MIN_SHARED, room) is None
    assert (
        scheduler.admit(lambda _: 501 - MIN_SHARED, room) is None
    )  # asked once only, while it waits
    scheduler.add(of_prompt((*COMMON, 3000)))
    assert scheduler.admit(lambda _: 501 - MIN_SHARED, room) is not None


def test_when_the_computing_one_leaves_the_next_takes_over_and_the_rest_wait_for_it() -> None:
    scheduler, first = one_computing(300)
    second, third = of_prompt((*COMMON, 3000)), of_prompt((*COMMON, 3001))
    scheduler.add(second)
    scheduler.add(third)
    assert scheduler.admit(nothing, room) is None
    scheduler.remove(first)
    first.move(State.FINISHED)
    assert scheduler.admit(nothing, room) is second
    second.move(State.RUNNING)
    second.kv = SequenceKV(SPEC)
    assert scheduler.admit(nothing, room) is None
    second.kv.length = 500
    assert scheduler.admit(nothing, room) is third


def scoring(num_prompt: int, first: int = 5) -> Sequence:
    prompt = tuple(range(first, first + num_prompt))
    request = GenerateRequest("r", None, prompt, SamplingParams(), prompt_logprobs=True)
    tokenizer = builtin_model(None).tokenizer
    return Sequence(
        *(request, SPEC.fingerprint, Stream(), 9, lambda _position: Draw(None, 0)),
        *(frozenset(), tokenizer.stream()),
    )


def test_of_prompts_that_are_scored_a_step_has_so_many_rows_at_most() -> None:
    scheduler = Scheduler(256, 8, most_scored=40)
    seqs = [scoring(100), scoring(30, 1000), sequence(300, first=5000)]
    for seq in seqs:
        scheduler.add(seq)
    while admitted := scheduler.admit(nothing, room):
        admitted.move(State.RUNNING)
        admitted.kv = SequenceKV(SPEC)
    rows = dict[Sequence, list[int]]()
    while step := scheduler.next_step():
        assert sum(w.num_tokens for w in step if w.seq.is_scoring) <= 40
        for work in step:
            assert work.seq.kv is not None
            rows.setdefault(work.seq, []).append(work.num_tokens)
            work.seq.kv.length += work.num_tokens
            work.seq.in_flight += work.samples
        if all(seq.in_flight for seq in seqs):
            break
    assert [sum(rows[seq]) for seq in seqs] >= [100, 30, 300]
    assert rows[seqs[2]][0] == 216  # what is left of the first step


def test_who_is_scored_waits_for_nobody_and_others_may_wait_for_it() -> None:
    scheduler = Scheduler(256, 8)
    first, again, other = scoring(500), scoring(500), sequence(500)
    scheduler.add(first)
    assert scheduler.admit(nothing, room) is first
    first.move(State.RUNNING)
    first.kv = SequenceKV(SPEC)
    scheduler.add(again)
    scheduler.add(other)
    assert scheduler.admit(nothing, room) is again
    assert scheduler.admit(nothing, room) is None and other.awaits is not None
    assert again.matchable == [5]
    again.num_scored = 300
    assert len(again.matchable) == 300
    again.num_scored = 500
    assert again.matchable == again.tokens


def test_one_whose_beginning_is_being_restored_is_waited_for_as_well() -> None:
    scheduler = Scheduler(256, 8)
    first, same = sequence(500), sequence(500)
    scheduler.add(first)
    scheduler.add(same)
    assert scheduler.admit(nothing, room) is first
    first.move(State.RESTORING)
    assert scheduler.admit(nothing, room) is None and same.awaits == (first, 499)
    first.move(State.RUNNING)
    first.kv = SequenceKV(SPEC)
    assert scheduler.admit(nothing, room) is None
    first.kv.length = 499
    assert scheduler.admit(lambda _seq: 499, room) is same


def test_nobody_waits_for_what_may_be_passed_over() -> None:
    scheduler = Scheduler(256, 8)
    asked = [(3000, BACKGROUND), (3001, INTERACTIVE), (3002, BACKGROUND)]
    night, day, later = (of_prompt((*COMMON, last), priority=p) for last, p in asked)
    for seq in (night, day):
        scheduler.add(seq)
        assert scheduler.admit(nothing, room) is seq
        run(seq)
    scheduler.add(later)
    assert scheduler.admit(nothing, room) is None and later.awaits is not None
