"""Blocks that choices and prompts share, as the scheduler hands them out."""

import pytest

from deltamux.wire.messages import Embed


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
