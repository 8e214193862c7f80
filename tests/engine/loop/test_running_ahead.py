"""A step is launched before the one before it has landed, wherever that can be."""

from __future__ import annotations

import pytest
import torch

from deltamux.engine.outcome import SampledToken
from deltamux.wire.messages import (
    Cancel,
    Classify,
    Pooled,
    RequestFailed,
    Sampling,
    Shutdown,
    StepDone,
)


def test_the_next_step_is_launched_before_the_one_before_has_landed(flying, submit):
    served, events = flying()
    served.steps(submit(max_tokens=3), times=3)
    assert events == ["launch", "launch", "land", "launch", "land"]
    # Nothing of it is left to be launched: nobody waits.
    served.steps()
    assert events[5:] == ["land"]
    assert [p.token_ids[0] for p in served.link.progress("r")] == [50, 51, 52]
    assert served.is_empty()
    # What it gave back may let a waiting request in: only the step after waits for news.
    served.steps(times=2)
    assert served.link.waits == [None, 0.0, 0.0, 0.0, 0.0, None]


def test_what_has_landed_is_told_while_the_next_one_is_under_way(flying, submit):
    served, _ = flying()
    served.steps(submit(max_tokens=9), times=2)
    assert [p.token_ids for p in served.link.progress("r")] == [(50,)]
    assert len(served.link.told(StepDone)) == 1


def test_what_stops_under_a_step_keeps_what_it_holds_until_that_has_landed(flying, submit):
    served, events = flying()
    served.runner.outcome = lambda sequence: SampledToken(served.stop_token)
    served.steps(submit(adapter="a", max_tokens=9), times=2)
    assert [(p.token_ids, p.finish) for p in served.link.progress("r")] == [
        ((served.stop_token,), "stop")
    ]
    assert served.scheduler.running == []
    assert (served.blocks.num_used, served.adapters.leases["a"]) == (1, 1)
    served.steps()
    assert events == ["launch", "launch", "land", "land"]
    assert len(served.link.progress("r")) == 1
    assert served.is_empty()
    assert served.link.sent[-1].stats.kv_blocks_used == 0


def test_a_deadline_under_a_step_ends_it_at_once_and_lets_go_later(flying, submit):
    served, _ = flying()
    served.steps(submit(adapter="a", max_tokens=9, deadline=5.0))
    served.now += 5.0
    served.runner.landing = lambda: held.append((served.blocks.num_used, served.link.sent[:]))
    held = []
    served.steps()
    ((blocks, (failed,)),) = held
    assert (blocks, failed.code) == (1, "DEADLINE_EXCEEDED")
    assert served.link.progress("r") == []
    assert served.is_empty()


@pytest.mark.parametrize("penalty", ["repetition", "presence", "frequency"])
def test_a_step_lands_first_whose_tokens_the_next_one_needs(flying, submit, penalty):
    served, events = flying()
    served.steps(submit("other", max_tokens=5), times=2)
    asked = submit(sampling=Sampling(seed=1, **{f"{penalty}_penalty": 1.5}))
    served.steps(asked, times=3)
    assert events[:3] == ["launch", "launch", "land"]
    assert events[3:] == ["launch", "land", "land", "launch", "land", "launch", "land"]


def test_a_step_lands_first_in_which_something_is_pooled(flying, submit):
    served, events = flying()
    served.runner.outcome = lambda s: Pooled(b"") if s.pooling else SampledToken(50)
    served.steps(submit("other", max_tokens=9), submit(adapter="a", pooling=Classify()))
    assert events == ["launch", "land"]
    served.steps(times=2)
    assert events[2:] == ["launch", "launch", "land"]


def test_a_step_lands_first_where_somebody_would_be_preempted(flying, submit):
    """Two sequences of four places each; both grow into the third block."""
    served, events = flying(num_blocks=3)
    served.steps(submit("a", prompt=range(2), max_tokens=6), submit("b", prompt=range(2)))
    assert events == ["launch"]
    served.steps(times=2)
    assert events[1:] == ["launch", "land", "launch", "land", "land"]
    assert served.scheduler.num_preemptions == 0
    served.step(times=9)
    assert [len(served.link.progress(name)) for name in "ab"] == [6, 3]
    assert served.is_empty()


def test_a_launch_without_memory_waits_for_the_step_before_and_runs_in_parts(flying, submit):
    served, events = flying()
    served.steps(submit("a", max_tokens=4), submit("b", max_tokens=4))
    served.runner.errors["launch"] = torch.OutOfMemoryError("no more")
    served.steps()
    assert events == ["launch", "land", "launch", "land", "launch", "land"]
    served.step(times=4)
    assert served.link.told(RequestFailed) == []
    for name in "ab":
        assert [p.token_ids[0] for p in served.link.progress(name)] == [50, 51, 52, 53]
    assert served.is_empty()


def test_what_was_launched_behind_a_step_without_memory_counts_for_nothing(flying, submit):
    served, events = flying()
    served.steps(submit("a", max_tokens=4), submit("b", max_tokens=4))
    served.runner.errors["collect"] = torch.OutOfMemoryError("no more")
    served.steps()
    # Both are waited for; then the first runs in two parts.
    assert events == ["launch", "launch", "land", "land", "launch", "land", "launch", "land"]
    assert [s.num_computed for s in served.scheduler.running] == [3, 3]
    served.step(times=4)
    for name in "ab":
        assert [p.token_ids[0] for p in served.link.progress(name)] == [50, 51, 52, 53]
    assert served.is_empty()


def test_what_has_ended_does_not_starve_for_want_of_memory(flying, submit):
    served, _ = flying()
    served.steps(submit(prompt=(1,), max_tokens=4))
    served.runner.errors["collect"] = torch.OutOfMemoryError("no more")
    served.steps(Cancel("r"), submit("other", max_tokens=4))
    served.step(times=4)
    assert served.link.told(RequestFailed) == [] and served.link.progress("r") == []
    assert [p.token_ids[0] for p in served.link.progress("other")] == [50, 51, 52, 53]
    assert served.is_empty()


def test_shutdown_lands_and_tells_what_is_under_way(flying, submit):
    served, events = flying()
    served.steps(submit(max_tokens=9))
    served.link.inbox.append(Shutdown())
    served.engine.run()
    assert events == ["launch", "launch", "land", "land"]
    assert [p.token_ids[0] for p in served.link.progress("r")] == [50, 51]


def test_a_step_takes_from_when_the_device_is_done_with_the_one_before(flying, submit):
    served, _ = flying()

    def compute():
        served.now += 2.0

    served.runner.landing = compute
    served.steps(submit(max_tokens=3), times=4)
    assert [done.stats.step_seconds for done in served.link.told(StepDone)] == [2.0, 2.0, 2.0]
