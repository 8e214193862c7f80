"""Answers with the prefix cache, without it, and of transformers and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltamux.wire.messages import Sampling

BLOCK_SIZE = 4
COMMON = tuple(range(7, 40))
# Each goes through the base and two adapters; 33 tokens are common, eight full blocks of them.
PROMPTS = (COMMON, (*COMMON, 50), (*COMMON, 51, 52, 53), COMMON[:9])
ADAPTERS = ("", "plain", "large")


def requests(submit, name, **fields):
    return [
        submit(f"{name}-{adapter}-{number}", prompt, adapter, max_tokens=6, **fields)
        for number, prompt in enumerate(PROMPTS)
        for adapter in ADAPTERS
    ]


def cached(answers):
    return [answer.first[0].cached_prompt_tokens for answer in answers]


@pytest.mark.parametrize("caching", [True, False])
def test_answers_are_the_same_with_and_without(
    caching, engine_in_thread, engine_config, world, submit
):
    config = replace(engine_config, kv_cache_bytes=1 << 20, enable_prefix_caching=caching)
    with engine_in_thread(config) as engine:
        # One by one, then all at once: the second time every full block is there.
        first = [engine.run(request)[0] for request in requests(submit, "first")]
        again = engine.run(*requests(submit, "again"))
        for answers in (first, again):
            for request, answer in zip(requests(submit, ""), answers, strict=True):
                adapter = request.request_id.split("-")[1]
                assert answer.tokens[0] == world.greedy(request.prompt, 6, adapter)
        assert cached(first) == ([0] * 3 + [32] * 6 + [8] * 3 if caching else [0] * 12)
        assert cached(again) == ([32] * 6 + [32] * 3 + [8] * 3 if caching else [0] * 12)
        engine.refresh()
        hits = sum(cached(first)) + sum(cached(again))
        assert (engine.stats.prefix_hits, engine.stats.prefix_queries) == (
            hits,
            2 * 3 * sum(map(len, PROMPTS)),
        )
        assert engine.is_quiet()


def test_salts_choices_and_answers(engine, world, submit):
    drawn = Sampling(temperature=1.0, seed=3)
    (first,) = engine.run(submit("salt-a", COMMON, cache_salt="a", sampling=drawn, n=2))
    (same,) = engine.run(submit("salt-b", COMMON, cache_salt="a", sampling=drawn, n=2))
    (other,) = engine.run(submit("salt-c", COMMON, cache_salt="c", sampling=drawn, n=2))
    assert cached([first, same, other]) == [0, 32, 0]
    assert first.tokens == same.tokens == other.tokens
    # The answer is part of what a conversation's next prompt begins with.
    prompt = (*COMMON, *first.tokens[0], 60)
    (next_turn,) = engine.run(submit("salt-d", prompt, cache_salt="a"))
    assert cached([next_turn]) == [40]
    assert next_turn.tokens[0] == world.greedy(prompt, 8)
