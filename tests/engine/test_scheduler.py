from itertools import permutations

import pytest

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.config import EngineConfig
from deltamux.engine import drain
from deltamux.engine.block_allocator import BlockAllocator
from deltamux.engine.block_manager import BlockManager
from deltamux.engine.limits import Limits
from deltamux.engine.scheduler import Scheduler
from deltamux.errors import InvalidArgument
from deltamux.wire.messages import Embed, Sampling

BLOCK_SIZE = 4


class Setup:
    """A scheduler, and the little that the engine does between two schedules."""

    def __init__(
        self, adapters, prefixes, num_blocks=100, seqs=8, budget=16, context=1000, generates=True
    ):
        config = EngineConfig(
            "", block_size=BLOCK_SIZE, max_num_seqs=seqs, max_num_batched_tokens=budget
        )
        self.adapters = adapters
        self.allocator = BlockAllocator(num_blocks + 1)
        self.prefixes = prefixes
        limits = Limits(100, context, num_blocks * BLOCK_SIZE, generates)
        self.blocks = BlockManager(self.allocator, BLOCK_SIZE, prefixes)
        self.scheduler = Scheduler(config, limits, self.blocks, adapters)
        self.now = 0.0

    def add(self, *sequences):
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self, seconds=0.1):
        """Runs a step and returns {sequence: tokens computed}."""
        self.now += seconds
        self.adapters.poll()
        plan = self.scheduler.schedule(self.now)
        sampling = [item.sequence for item in plan.scheduled if item.yields]
        for item in plan.scheduled:
            self.blocks.complete(item.sequence, item.num_tokens)
        for sequence in sampling:
            sequence.tokens.append(7)
            if sequence.num_generated == sequence.stopping.max_tokens:
                self.scheduler.finish(sequence)
        return {item.sequence: item.num_tokens for item in plan.scheduled}

    def steps_until(self, condition, limit=500):
        for step in range(limit):
            if condition():
                return step
            self.step()
        raise AssertionError(f"not within {limit} steps")

    def is_empty(self):
        return (
            not self.scheduler.running
            and not self.scheduler.waiting
            and self.allocator.num_free == self.allocator.num_total
            and not self.adapters.leases.total()
        )


@pytest.fixture
def setup(fake_adapters, fake_prefixes):
    def make(slots=2, load_polls=0, **limits):
        return Setup(fake_adapters(slots, load_polls), fake_prefixes(), **limits)

    return make


def test_whole_prompts_wait_for_a_step_that_holds_them(setup, new_sequence):
    engine = setup(budget=16, generates=False)
    prompts = [new_sequence(num_prompt=n, max_tokens=1) for n in (6, 12, 3, 16)]
    engine.add(*prompts)
    first, second, third, fourth = prompts
    assert engine.step() == {first: 6}
    assert engine.step() == {second: 12, third: 3}
    assert engine.step() == {fourth: 16}
    assert engine.is_empty()


def test_prefill_is_chunked_under_the_budget_and_decodes_come_first(setup, new_sequence):
    engine = setup(budget=16)
    long, short = new_sequence(num_prompt=30), new_sequence(num_prompt=3)
    engine.add(long)
    assert engine.step() == {long: 16}
    engine.add(short)
    assert engine.step() == {long: 14, short: 2}
    assert engine.step() == {long: 1, short: 1}
    assert engine.step() == {long: 1, short: 1}

    late = new_sequence(num_prompt=40, priority=1)
    engine.add(late)
    plan = engine.step()
    assert plan == {long: 1, short: 1, late: 14}
    assert list(plan) == [long, short, late]


def test_no_more_sequences_run_than_allowed(setup, new_sequence):
    engine = setup(seqs=3)
    sequences = [new_sequence() for _ in range(5)]
    engine.add(*sequences)
    engine.step()
    assert engine.scheduler.running == sequences[:3]
    engine.steps_until(engine.is_empty)


def test_more_sequences_than_budget_all_have_their_token_in_every_step(setup, new_sequence):
    engine = setup(seqs=8, budget=2)
    sequences = [new_sequence(num_prompt=1) for _ in range(4)]
    engine.add(*sequences)
    assert engine.step() == {sequences[0]: 1, sequences[1]: 1}
    engine.steps_until(engine.is_empty)


def test_larger_priority_runs_first_then_earlier_arrival(setup, new_sequence):
    engine = setup(seqs=1)
    first, second, urgent = new_sequence(), new_sequence(), new_sequence(priority=5)
    engine.add(second, first, urgent)
    assert engine.scheduler.waiting == [urgent, first, second]


def test_the_youngest_is_preempted_and_computed_again(setup, new_sequence):
    engine = setup(num_blocks=6)
    old = new_sequence(num_prompt=8, max_tokens=16, adapter="a")
    young = new_sequence(num_prompt=8, max_tokens=16, adapter="b")
    engine.add(old, young)
    engine.steps_until(lambda: engine.scheduler.num_preemptions)
    assert old in engine.scheduler.running
    assert engine.scheduler.waiting == [young]
    assert young.blocks == [] and young.num_computed == 0 and young.slot is None
    assert engine.adapters.leases == {"a": 1, "b": 0}
    generated = young.num_generated
    assert generated > 0

    engine.steps_until(lambda: young.blocks)
    assert young.num_computed > 1
    assert young.num_generated >= generated
    engine.steps_until(engine.is_empty)
    assert old.num_generated == young.num_generated == 16


def test_priority_outranks_age_when_blocks_run_out(setup, new_sequence):
    engine = setup(num_blocks=6)
    old = new_sequence(num_prompt=8, max_tokens=16)
    urgent = new_sequence(num_prompt=8, max_tokens=16, priority=1)
    engine.add(old, urgent)
    engine.steps_until(lambda: engine.scheduler.num_preemptions)
    assert engine.scheduler.waiting == [old]


def test_a_newcomer_waits_until_it_would_not_be_preempted_at_once(setup, new_sequence):
    engine = setup(num_blocks=5)
    old, young = new_sequence(num_prompt=8, max_tokens=8), new_sequence(num_prompt=12)
    engine.add(old)
    engine.step()
    engine.add(young)
    engine.steps_until(engine.is_empty)
    assert engine.scheduler.num_preemptions == 0


def test_a_missing_adapter_delays_no_other_request(setup, new_sequence):
    engine = setup(load_polls=3)
    cold, base, ready = new_sequence(adapter="cold"), new_sequence(), new_sequence(adapter="a")
    engine.adapters.load_polls = 0
    engine.adapters.acquire("a", "", "Generate")
    engine.adapters.release("a")
    engine.adapters.load_polls = 3
    engine.add(cold, base, ready)
    assert set(engine.step()) == {base, ready}
    engine.steps_until(lambda: cold.blocks)
    assert cold.adapter_missed == pytest.approx(0.1)
    assert cold.admitted > cold.adapter_missed
    engine.steps_until(engine.is_empty)


def test_a_missing_adapter_is_asked_for_once_a_step_and_waited_for_by_all(setup, new_sequence):
    engine = setup(load_polls=3)
    asked, acquire = [], engine.adapters.acquire
    engine.adapters.acquire = lambda *asking: asked.append(asking[0]) or acquire(*asking)
    sequences = [new_sequence(adapter="cold") for _ in range(3)]
    engine.add(*sequences)
    engine.step()
    assert asked == ["cold"]
    assert [sequence.adapter_missed for sequence in sequences] == [pytest.approx(0.1)] * 3


def test_a_broken_adapter_is_told_and_takes_nothing(setup, new_sequence):
    engine = setup()
    engine.adapters.broken["bad"] = InvalidArgument("broken", reason="BROKEN")
    bad, good = new_sequence(adapter="bad"), new_sequence(adapter="good")
    engine.add(bad, good)
    plan = engine.scheduler.schedule(0.0)
    (failure,) = plan.failed.items()
    assert (failure[0], failure[1].code, failure[1].reason) == (
        bad.request_id,
        "FAILED_PRECONDITION",
        "BROKEN",
    )
    assert [item.sequence for item in plan.scheduled] == [good]
    assert bad.blocks == [] and bad in engine.scheduler.waiting


def test_choices_share_the_full_blocks_of_the_prompt(setup, new_sequence):
    engine = setup(budget=8)
    leader = new_sequence(num_prompt=10, adapter="a")
    followers = [new_sequence(num_prompt=10, adapter="a", leader=leader) for _ in range(2)]
    engine.add(leader, *followers)
    assert engine.step() == {leader: 8}
    # The leader's first 8 tokens are two full blocks: the followers compute the other two.
    assert engine.step() == {leader: 2, followers[0]: 2, followers[1]: 2}
    assert followers[0].blocks[:2] == leader.blocks[:2] == followers[1].blocks[:2]
    assert len({sequence.blocks[2] for sequence in (leader, *followers)}) == 3
    assert engine.adapters.leases["a"] == 3
    engine.steps_until(engine.is_empty)


def test_choices_never_share_the_block_of_the_last_prompt_token(setup, new_sequence):
    engine = setup(budget=100)
    leader = new_sequence(num_prompt=8)
    follower = new_sequence(num_prompt=8, leader=leader)
    engine.add(leader, follower)
    assert engine.step() == {leader: 8}
    assert engine.step() == {leader: 1, follower: 4}


def test_waiting_for_the_leader_delays_no_other_request(setup, new_sequence):
    engine = setup(budget=12)
    leader = new_sequence(num_prompt=10)
    follower, other = new_sequence(num_prompt=10, leader=leader), new_sequence(num_prompt=2)
    engine.add(leader, follower, other)
    assert engine.step() == {leader: 10, other: 2}


@pytest.mark.parametrize("fate", ["cancelled", "preempted"])
@pytest.mark.parametrize(("lost", "computed"), [(False, 2), (True, 8)])
def test_a_choice_goes_on_where_the_first_is_gone(setup, new_sequence, fate, lost, computed):
    engine = setup(num_blocks=10, budget=8)
    leader = new_sequence(num_prompt=10)
    follower = new_sequence(num_prompt=10, leader=leader)
    engine.add(leader, follower)
    engine.step()
    if fate == "cancelled":
        engine.scheduler.cancel(leader.request_id, (leader.index,))
    else:
        engine.scheduler._preempt(leader)
        engine.scheduler.waiting.remove(leader)
    if lost:
        engine.allocator.free(engine.allocator.allocate(10))
    assert engine.step() == {follower: computed}
    engine.steps_until(engine.is_empty)


def test_a_prompt_that_begins_like_an_earlier_one_skips_its_full_blocks(setup, new_sequence):
    engine = setup()
    first = new_sequence(num_prompt=10, salt="", max_tokens=3)
    engine.add(first)
    engine.steps_until(engine.is_empty)
    # Ten tokens of the prompt and two of the answer: three full blocks.
    again, longer = new_sequence(num_prompt=10, salt=""), new_sequence(num_prompt=14, salt="")
    answered = new_sequence(salt="")
    answered.tokens, answered.num_prompt = [*first.tokens], len(first.tokens)
    engine.add(again, longer, answered)
    assert engine.step() == {again: 2, longer: 6, answered: 1}
    assert [s.num_cached for s in (again, longer, answered)] == [8, 8, 12]
    assert (engine.blocks.prefix_queries, engine.blocks.prefix_hits) == (47, 28)


def test_the_last_token_of_a_prompt_is_always_computed(setup, new_sequence):
    engine = setup()
    first, again = new_sequence(num_prompt=8, salt=""), new_sequence(num_prompt=8, salt="")
    engine.add(first)
    engine.step()
    engine.add(again)
    assert engine.step() == {first: 1, again: 4}


def test_a_prompt_to_be_pooled_is_computed_whole_and_its_blocks_serve_others(setup, new_sequence):
    engine = setup()
    first, pooled, last = (new_sequence(num_prompt=9, salt="") for _ in range(3))
    pooled.pooling = Embed("mean", normalize=True)
    engine.add(first)
    engine.steps_until(engine.is_empty)
    engine.add(pooled)
    assert engine.step() == {pooled: 9}
    engine.scheduler.finish(pooled)
    engine.add(last)
    assert engine.step() == {last: 1}


@pytest.mark.parametrize(("adapter", "salt"), [("b", "s"), ("a", "t"), ("", "s"), ("a", "")])
def test_adapters_and_salts_share_nothing(setup, new_sequence, adapter, salt):
    engine = setup()
    engine.add(new_sequence(num_prompt=9, adapter="a", salt="s"))
    engine.steps_until(engine.is_empty)
    other = new_sequence(num_prompt=9, adapter=adapter, salt=salt)
    engine.add(other)
    assert engine.step() == {other: 9}
    assert engine.blocks.prefix_hits == 0


def test_choices_count_once(setup, new_sequence):
    engine = setup()
    leader = new_sequence(num_prompt=9, salt="")
    engine.add(leader, new_sequence(num_prompt=9, salt="", leader=leader))
    engine.steps_until(engine.is_empty)
    assert (engine.blocks.prefix_queries, engine.blocks.prefix_hits) == (9, 0)
    engine.add(new_sequence(num_prompt=9, salt=""))
    engine.step()
    assert (engine.blocks.prefix_queries, engine.blocks.prefix_hits) == (18, 8)


def test_a_preempted_sequence_finds_what_nobody_took(setup, new_sequence):
    engine = setup()
    sequence = new_sequence(num_prompt=10)
    engine.add(sequence)
    engine.step()
    engine.scheduler._preempt(sequence)
    assert engine.step() == {sequence: 3}
    assert sequence.num_cached == 0


def test_free_blocks_with_content_are_room_for_others(setup, new_sequence):
    """The cache is as large as what is free, and gives way at once."""
    engine = setup(num_blocks=6)
    engine.add(new_sequence(num_prompt=12, salt="", max_tokens=1))
    engine.steps_until(engine.is_empty)
    other = new_sequence(num_prompt=21, salt="other", max_tokens=1)
    engine.add(other)
    engine.step()
    assert len(other.blocks) == 6
    engine.steps_until(engine.is_empty)


def test_blocks_that_a_match_takes_from_the_free_ones_are_counted(setup, new_sequence):
    engine = setup(num_blocks=7)
    engine.add(new_sequence(num_prompt=13, salt="", max_tokens=1))
    engine.steps_until(engine.is_empty)
    running = new_sequence(num_prompt=9, max_tokens=4)
    engine.add(running)
    engine.step()
    # Four blocks are free, three of them a match: one is left for the rest, none in reserve.
    engine.add(new_sequence(num_prompt=14, salt="", max_tokens=3))
    assert engine.step() == {running: 1}


def with_virtual(engine, **virtuals):
    engine.adapters.virtuals.update(virtuals)
    return engine


def test_virtual_tokens_are_computed_once_for_all_requests_of_an_adapter(setup, new_sequence):
    """Ten of them: two full blocks, and two beside the first tokens of each request."""
    engine = with_virtual(setup(), a=Virtual(10))
    first, second = new_sequence(adapter="a"), new_sequence(adapter="a")
    engine.add(first)
    assert engine.step() == {first: 14}
    engine.add(second)
    assert engine.step() == {first: 1, second: 6}
    assert first.blocks[:2] == second.blocks[:2]
    assert not set(first.blocks[2:]) & set(second.blocks)
    assert first.num_cached == second.num_cached == 0
    assert engine.blocks.prefix_hits == 0
    engine.steps_until(engine.is_empty)


def test_a_prompt_behind_virtual_tokens_is_found_and_only_its_tokens_count(setup, new_sequence):
    engine = with_virtual(setup(), a=Virtual(2))
    engine.add(new_sequence(num_prompt=9, adapter="a", salt=""))
    engine.steps_until(engine.is_empty)
    again = new_sequence(num_prompt=9, adapter="a", salt="")
    engine.add(again)
    assert engine.step() == {again: 3}
    assert again.num_cached == engine.blocks.prefix_hits == 6


def test_keys_and_values_that_the_adapter_brings_are_filled_in_not_computed(setup, new_sequence):
    engine = with_virtual(setup(), a=Virtual(10, computed=False))
    first, second = new_sequence(adapter="a"), new_sequence(adapter="a")
    engine.add(first, second)
    assert engine.step() == {first: 4, second: 4}
    slot = engine.adapters.device["a"]
    # The second one finds the two full blocks, and has its own place for the other two tokens.
    assert engine.prefixes.fills == [(slot, first.blocks, 0), (slot, second.blocks, 8)]
    assert first.blocks[:2] == second.blocks[:2] and first.blocks[2] != second.blocks[2]
    engine.steps_until(engine.is_empty)
    engine.add(new_sequence(adapter="a"))
    engine.step()
    assert engine.prefixes.fills[2][2] == 8


def test_a_prefix_that_gave_way_is_filled_in_again(setup, new_sequence):
    engine = with_virtual(setup(num_blocks=5), a=Virtual(8, computed=False))
    engine.add(new_sequence(adapter="a", max_tokens=1))
    engine.steps_until(engine.is_empty)
    engine.add(new_sequence(num_prompt=20, max_tokens=1))
    engine.steps_until(engine.is_empty)
    engine.add(new_sequence(adapter="a", max_tokens=1))
    engine.steps_until(engine.is_empty)
    assert [first for _, _, first in engine.prefixes.fills] == [0, 0]


@pytest.mark.parametrize(
    ("virtual", "prompt", "reason"),
    [(Virtual(16), 4, "PROMPT_LENGTH"), (Virtual(30), 4, "PROMPT_LENGTH"), (Virtual(8), 9, None)],
)
def test_virtual_tokens_count_for_the_context(setup, new_sequence, virtual, prompt, reason):
    engine = with_virtual(setup(context=20, budget=40), a=virtual)
    request, other = new_sequence(num_prompt=prompt, adapter="a"), new_sequence()
    engine.add(request, other)
    plan = engine.scheduler.schedule(0.0)
    assert other in [item.sequence for item in plan.scheduled]
    assert [error.reason for error in plan.failed.values()] == ([reason] if reason else [])
    assert (request in engine.scheduler.running) == (reason is None)


def test_virtual_tokens_count_for_the_kv_cache(setup, new_sequence):
    engine = with_virtual(setup(num_blocks=4), a=Virtual(10))
    engine.add(new_sequence(num_prompt=4, adapter="a", max_tokens=4))
    (error,) = engine.scheduler.schedule(0.0).failed.values()
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "KV_CACHE_TOO_SMALL")
    assert "17 tokens" in error.message and "10 virtual" in error.message


def test_distrusted_content_is_not_found(setup, new_sequence):
    engine = setup()
    poisoned, again = new_sequence(num_prompt=9, salt=""), new_sequence(num_prompt=9, salt="")
    engine.add(poisoned)
    engine.step()
    engine.blocks.distrust(poisoned)
    engine.scheduler.finish(poisoned)
    engine.add(again)
    assert engine.step() == {again: 9}


def test_shared_blocks_outlive_the_leader(setup, new_sequence):
    engine = setup()
    leader = new_sequence(num_prompt=10)
    follower = new_sequence(num_prompt=10, leader=leader, max_tokens=12)
    engine.add(leader, follower)
    engine.step()
    engine.step()
    shared = follower.blocks[:2]
    engine.scheduler.cancel(leader.request_id, (leader.index,))
    newcomers = [new_sequence(num_prompt=8) for _ in range(6)]
    engine.add(*newcomers)
    engine.step()
    assert not any(set(shared) & set(newcomer.blocks) for newcomer in newcomers)
    engine.steps_until(engine.is_empty)


def test_cancel_frees_whatever_state_a_choice_is_in(setup, new_sequence):
    engine = setup(budget=8)
    decoding = new_sequence(num_prompt=2, max_tokens=50, adapter="a")
    prefilling = new_sequence(num_prompt=40, adapter="b")
    waiting = new_sequence(adapter="c")
    engine.add(decoding, prefilling, waiting)
    engine.step()
    engine.step()
    assert [s.num_uncomputed > 1 for s in engine.scheduler.running] == [False, True]
    for sequence in (decoding, prefilling, waiting):
        engine.scheduler.cancel(sequence.request_id)
    engine.scheduler.cancel("unknown")
    assert engine.is_empty()


def test_cancel_of_some_choices_leaves_the_others(setup, new_sequence):
    engine = setup()
    leader = new_sequence()
    followers = [new_sequence(leader=leader) for _ in range(2)]
    engine.add(leader, *followers)
    engine.step()
    engine.scheduler.cancel(leader.request_id, (leader.index, followers[1].index))
    assert engine.scheduler.running == [followers[0]]


def test_deadlines(setup, new_sequence):
    engine = setup(seqs=1)
    running, waiting = new_sequence(deadline=5.0), new_sequence(deadline=3.0)
    engine.add(running, waiting, new_sequence())
    engine.step()
    assert engine.scheduler.next_deadline() == 3.0
    assert engine.scheduler.expired(2.9) == set()
    assert engine.scheduler.expired(3.0) == {waiting.request_id}
    assert engine.scheduler.expired(6.0) == {running.request_id, waiting.request_id}


def test_any_mix_of_more_adapters_than_slots_completes(setup, new_sequence):
    for order in permutations(["", "a", "b", "c", "d"]):
        engine = setup(slots=3, load_polls=1)
        sequences = [new_sequence(adapter=adapter, max_tokens=2) for adapter in order]
        engine.add(*sequences)
        engine.steps_until(engine.is_empty, limit=50)
        assert all(sequence.num_generated == 2 for sequence in sequences)


def _steps_of_rare_request(engine, new_sequence, limit):
    """Steps until a request for "rare" is through, while two hot adapters always have more."""
    engine.add(*(new_sequence(adapter=hot, max_tokens=20) for hot in ("hot-1", "hot-2")))
    engine.step()
    rare = new_sequence(adapter="rare", max_tokens=2)
    engine.add(rare)
    for step in range(limit):
        for hot in ("hot-1", "hot-2"):
            if sum(s.adapter == hot for s in engine.scheduler.waiting) < 2:
                engine.add(new_sequence(adapter=hot, max_tokens=20))
        engine.step()
        if rare.num_generated == 2:
            return step
    return None


def test_a_request_without_a_slot_does_not_starve(setup, new_sequence):
    """20 steps of patience, then at most the 20 of the longest run, then its own."""
    steps = _steps_of_rare_request(setup(slots=2, seqs=6), new_sequence, 100)
    assert 20 <= steps <= 45


def test_without_the_drain_it_would_starve(setup, new_sequence, monkeypatch):
    monkeypatch.setattr(drain, "PATIENCE", 1e9)
    assert _steps_of_rare_request(setup(slots=2, seqs=6), new_sequence, 300) is None


def test_while_one_adapter_drains_the_others_and_the_base_go_on(setup, new_sequence):
    engine = setup(slots=2)
    short = new_sequence(adapter="short", max_tokens=40)
    long = new_sequence(adapter="long", max_tokens=80)
    rare = new_sequence(adapter="rare")
    engine.add(short, long, rare)
    engine.step()
    engine.step(seconds=drain.PATIENCE)
    more = [new_sequence(adapter=adapter) for adapter in ("short", "long", "", "new")]
    engine.add(*more)
    engine.step()
    assert set(engine.scheduler.running) == {short, long, more[1], more[2]}
    engine.step(seconds=drain.PATIENCE)
    engine.add(late := new_sequence(adapter="long"))
    engine.step()
    assert late in engine.scheduler.waiting
    engine.steps_until(engine.is_empty)


def failures(engine, sequence, steps):
    """Of the step in which the sequence runs or fails."""
    engine.add(sequence)
    for _ in range(steps):
        engine.adapters.poll()
        plan = engine.scheduler.schedule(engine.now)
        if plan.scheduled or plan.failed:
            return [(error.reason, error.field) for error in plan.failed.values()]
    raise AssertionError("nothing came of it")


@pytest.mark.parametrize(("adapter", "reach"), [("more", 104), ("plain", 100), ("fewer", 90)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_vocabulary_that_is_known_late_bounds_the_ids_of_a_request(
    setup, new_sequence, adapter, reach, biased
):
    """Hundred tokens of the base; while the adapter is loaded, nobody is refused."""
    engine = setup(load_polls=3)
    engine.adapters.vocabularies = {"more": 104, "fewer": 90}

    def request(largest):
        made = new_sequence(adapter=adapter)
        if biased:
            made.sampling = Sampling(logit_bias={largest: 1.0})
        else:
            made.tokens[-1] = largest
        made.ids_below = largest + 1
        return made

    field = "sampling.logit_bias" if biased else "token_ids"
    assert failures(engine, request(reach), 6) == [("TOKEN_ID_OUT_OF_RANGE", field)]
    engine.scheduler.cancel(engine.scheduler.waiting[0].request_id)
    assert failures(engine, request(reach - 1), 6) == []
