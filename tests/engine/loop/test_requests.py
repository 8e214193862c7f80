"""From a request to its answer, as the front end is told of it."""

from __future__ import annotations

import pytest

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.engine.outcome import SampledToken
from deltamux.wire.messages import (
    AdapterDropped,
    Cancel,
    Classify,
    DropAdapter,
    LoadAdapter,
    Logprob,
    PinAdapter,
    Pooled,
    RequestFailed,
    Shutdown,
    StepDone,
    TokenLogprobs,
)


def test_a_request_from_submit_to_finish(setup, submit):
    served = setup()
    served.step(submit(adapter="a"), times=3)
    assert [
        (p.index, p.token_ids, p.finish, p.first is not None) for p in served.link.progress("r")
    ] == [(0, (50,), "", True), (0, (51,), "", False), (0, (52,), "length", False)]
    assert served.is_empty()


def test_what_is_pooled_ends_its_request(setup, submit):
    served, pooled = setup(), Pooled(b"numbers")
    served.runner.outcome = lambda sequence: pooled
    served.step(submit(adapter="a", pooling=Classify()))
    (progress,) = served.link.progress("r")
    assert (progress.pooled, progress.finish, progress.token_ids) == (pooled, "stop", ())
    assert progress.first is not None and progress.first.tier == "disk"
    assert served.is_empty()


def test_every_step_sends_one_message_with_the_state(setup, submit):
    served = setup()
    served.step(submit("r", adapter="a"), submit("s"))
    (done,) = served.link.told(StepDone)
    assert [p.request_id for p in done.progress] == ["r", "s"]
    assert (done.stats.running, done.stats.waiting) == (2, 0)
    assert (done.stats.step_rows, done.stats.step_adapters) == (6, 1)
    assert (done.stats.kv_blocks_used, done.stats.kv_blocks_total) == (2, 20)
    served.step(times=4)
    assert served.link.sent[-1].stats.running == 0
    assert served.link.sent[-1].stats.step_rows == 0


def test_stop_token_ends_it_only_after_min_tokens(setup, submit):
    served = setup()
    served.runner.outcome = lambda sequence: SampledToken(served.stop_token, None)
    served.step(submit(max_tokens=10, min_tokens=3), times=3)
    assert [p.finish for p in served.link.progress("r")] == ["", "", "stop"]
    assert served.is_empty()


def test_the_context_ends_it_with_length(setup, submit):
    served = setup()
    served.step(submit(prompt=range(30), max_tokens=10), times=5)
    assert [p.finish for p in served.link.progress("r")] == ["", "length"]


def test_virtual_tokens_take_room_in_the_context(setup, submit):
    served = setup()
    served.adapters.virtuals["a"] = Virtual(28)
    served.step(submit(prompt=range(2), adapter="a", max_tokens=10), times=9)
    assert [p.finish for p in served.link.progress("r")] == ["", "length"]
    assert served.link.progress("r")[0].first.cached_prompt_tokens == 0
    assert served.is_empty()


def test_a_stop_token_as_the_last_allowed_one_is_a_stop(setup, submit):
    served = setup()
    served.runner.outcome = lambda sequence: SampledToken(served.stop_token, None)
    served.step(submit(max_tokens=1))
    assert [p.finish for p in served.link.progress("r")] == ["stop"]


def test_first_token_tells_how_much_of_the_prompt_was_there(setup, submit):
    served = setup()
    served.step(submit("r", prompt=range(10), n=2), times=2)
    served.step(submit("s", prompt=range(10)), submit("t", prompt=range(10), cache_salt="t"))
    cached = [served.link.progress(name)[0].first.cached_prompt_tokens for name in "rst"]
    assert cached == [0, 8, 0]
    stats = served.link.sent[-1].stats
    assert (stats.prefix_queries, stats.prefix_hits) == (30, 8)


def test_logprobs_go_along(setup, submit):
    served = setup()
    logprobs = TokenLogprobs(Logprob(5, -0.5), (Logprob(5, -0.5),))
    served.runner.outcome = lambda sequence: SampledToken(5, logprobs)
    served.step(submit(max_tokens=1))
    (progress,) = served.link.progress("r")
    assert progress.logprobs == (logprobs,)


def test_choices_are_told_apart(setup, submit):
    served = setup()
    served.step(submit(n=3, max_tokens=2), times=4)
    finished = [p.index for p in served.link.progress("r") if p.finish == "length"]
    assert sorted(finished) == [0, 1, 2]
    assert sum(p.first is not None for p in served.link.progress("r")) == 3
    assert served.is_empty()


def test_first_token_tells_queueing_from_the_adapters_load(setup, submit):
    served = setup(load_polls=2)
    for number in range(8):
        served.step(submit(f"busy-{number}", max_tokens=20))
    served.step(submit(adapter="a"))
    served.now += 3.0
    served.step(*(Cancel(f"busy-{number}") for number in range(8)))
    served.now += 2.0
    served.step(times=3)
    first = served.link.progress("r")[0].first
    assert (first.queue, first.adapter_load, first.tier) == (3.0, 2.0, "disk")
    served.step(submit("again", adapter="a"))
    first = served.link.progress("again")[0].first
    assert (first.queue, first.adapter_load, first.tier) == (0.0, 0.0, "device")


@pytest.mark.parametrize("setup", [False], indirect=True)
def test_a_step_is_told_while_the_next_one_is_under_way(setup, submit):
    served, sent = setup(), []
    served.runner.landing = lambda: sent.append(len(served.link.progress("r")))
    served.link.inbox.append(submit(max_tokens=3))
    for _ in range(3):
        served.engine.step()
    assert sent == [0, 1, 2]
    served.engine.step()
    assert [p.finish for p in served.link.progress("r")] == ["", "", "length"]


@pytest.mark.parametrize("setup", [False], indirect=True)
def test_what_is_told_keeps_its_order(setup, submit):
    """The failure comes behind the tokens of the step before it, which are sent late."""
    served = setup()
    served.link.inbox.append(submit(max_tokens=9, deadline=5.0))
    served.engine.step()
    served.now += 5.0
    served.engine.step()
    kinds = [type(message) for message in served.link.sent]
    assert kinds == [StepDone, RequestFailed, StepDone]
    assert [p.token_ids for p in served.link.sent[0].progress] == [(50,)]


def test_orders_for_adapters_are_passed_on_and_news_are_told(setup):
    served = setup()
    served.adapters.poll = lambda: [AdapterDropped("d")]
    served.step(LoadAdapter("a", "/p", True, True), PinAdapter("b", "/q", False), DropAdapter("d"))
    assert served.adapters.orders == [
        ("load", "a", "/p", True, True),
        ("pin", "b", "/q", False),
        ("drop", "d"),
    ]
    assert served.link.told(AdapterDropped) == [AdapterDropped("d")]


def test_shutdown_ends_the_loop_and_the_loading(setup):
    served = setup()
    served.link.inbox.append(Shutdown())
    served.engine.run()
    assert served.engine.stopped and served.adapters.orders == [("close",)]
