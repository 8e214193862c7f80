"""A real engine that runs ahead of its device gives every request what one gives that does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from msgspec import structs

from deltamux.config import EngineConfig
from deltamux.engine import build
from deltamux.engine.flights import Flights
from deltamux.wire.messages import Cancel, Embed, Sampling, Stopping, Submit

PROMPT = (3, 14, 15, 92, 65, 35, 89, 79, 32, 38)
SEEDED = Sampling(temperature=1.0, top_p=0.95, seed=11)
STOPS = tuple(range(0, 128, 6))


@contextmanager
def running(engine_in_thread, config: EngineConfig, ahead: bool) -> Iterator[tuple]:
    """An engine, and of each of its launches the number of steps that were under way."""
    behind, launch = [], Flights.launch

    def counted(flights: Flights, step: list) -> bool:
        behind.append(len(flights))
        return launch(flights, step)

    with pytest.MonkeyPatch.context() as patch:
        # The host computes all the same: as soon as a step is launched.
        patch.setattr(build, "computes_beside", lambda device: ahead)
        patch.setattr(Flights, "launch", counted)
        with engine_in_thread(config) as driver:
            yield driver, behind
            driver.until(driver.is_quiet)


def requests(submit) -> list[Submit]:
    """Of all adapters, some of them at once in one slot; prompts in one step and in several."""
    adapters = ("small", "", "plain", "large", "", "scaled", "small")
    made = [
        submit(f"greedy-{number}", PROMPT[: 4 + number] * (1 + number % 3), adapter, 12 + number)
        for number, adapter in enumerate(adapters)
    ]
    stopping = Stopping(max_tokens=40, min_tokens=5, stop_token_ids=STOPS)
    stopped = structs.replace(
        submit("stopped", PROMPT, "plain", sampling=SEEDED), stopping=stopping
    )
    biased = submit("biased", PROMPT, "small", 15, Sampling(logit_bias={7: 9.0, 8: 9.0}))
    return [*made, stopped, biased, submit("choices", PROMPT, "large", 9, SEEDED, n=3)]


@pytest.mark.parametrize("kv_cache_bytes", [1 << 20, 1 << 15], ids=["room", "preemption"])
def test_every_stream_is_the_same(world, submit, engine_in_thread, engine_config, kv_cache_bytes):
    config = replace(engine_config, kv_cache_bytes=kv_cache_bytes)
    answers = {}
    for ahead in (False, True):
        with running(engine_in_thread, config, ahead) as (driver, behind):
            answers[ahead] = driver.run(*requests(submit))
            preemptions = driver.stats.preemptions
        assert max(behind) == ahead
        assert preemptions or kv_cache_bytes > 1 << 15
    for asked, alone, answer in zip(requests(submit), *answers.values(), strict=True):
        assert (answer.tokens, answer.finish) == (alone.tokens, alone.finish)
        if asked.request_id.startswith("greedy"):
            name = next((n for n, a in world.adapters.items() if a.digest == asked.adapter), "")
            expected = world.greedy(asked.prompt, asked.stopping.max_tokens, name)
            assert answer.tokens[0] == expected
    stopped = answers[True][-3]
    assert stopped.finish[0] == "stop" and len(stopped.tokens[0]) >= 5
    assert stopped.tokens[0][-1] in STOPS


def test_penalties_see_every_token(submit, engine_in_thread, engine_config):
    sampling = Sampling(repetition_penalty=1.8, frequency_penalty=0.5)
    asked = [submit("penalised", PROMPT, "small", 30, sampling), submit("plain", PROMPT)]
    answers = []
    for ahead in (False, True):
        with running(engine_in_thread, engine_config, ahead) as (driver, _):
            answers.append([(answer.tokens, answer.finish) for answer in driver.run(*asked)])
    assert answers[0] == answers[1]


def test_what_is_cancelled_and_what_is_pooled_leave_the_others_alone(
    world, submit, engine_in_thread, engine_config
):
    with running(engine_in_thread, engine_config, ahead=True) as (driver, behind):
        left = [submit(f"left-{number}", PROMPT, "large", 200) for number in range(3)]
        driver.send(*left)
        driver.until(lambda: all(driver.answers[s.request_id].tokens for s in left))
        driver.send(*(Cancel(s.request_id) for s in left))
        pooled = submit("pooled", PROMPT, "small", pooling=Embed("mean", normalize=True))
        stays, embedded = driver.run(submit("stays", PROMPT, "plain", 30), pooled)
        assert stays.tokens[0] == world.greedy(PROMPT, 30, "plain")
        assert embedded.finish == {0: "stop"}
    assert max(behind) == 1
