"""Virtual tokens and prefixes of adapters, as the scheduler makes room for them."""

import pytest

from deltamux.adapters.primitives.virtual_tokens import Virtual


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
    assert engine.prefixes.fills == [(slot, list(first.blocks), 0), (slot, list(second.blocks), 8)]
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
