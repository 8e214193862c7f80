"""What the engine does at rest: it sleeps, or has chores done."""

from __future__ import annotations

from deltamux.engine.engine import _LULL
from deltamux.wire.messages import Cancel


def test_it_sleeps_only_without_work_and_until_the_next_deadline(setup, submit):
    served = setup(load_polls=99)
    served.step()
    assert served.link.waits == [None]
    served.step(submit(max_tokens=1))
    # Something ran: what it gave back may let a waiting request in.
    served.step()
    served.step(submit(adapter="cold", deadline=4.0))
    served.now += 1.0
    served.step()
    served.now += 9.0
    served.step()
    assert served.link.waits == [None, None, 0.0, None, 3.0, 0.0]


def test_all_chores_are_done_before_it_sleeps(setup):
    served, done = setup(), []
    served.chores = [lambda: done.append("first"), lambda: done.append("second")]
    served.step()
    assert done == ["first", "second"]
    assert served.link.waits == [_LULL, _LULL, None]


def test_who_asks_during_a_chore_waits_for_no_other(setup, submit):
    served, done = setup(), []
    request = submit(max_tokens=1)
    served.chores = [lambda: served.link.inbox.append(request), lambda: done.append("second")]
    served.step()
    assert [p.finish for p in served.link.progress("r")] == ["length"]
    assert not done
    served.step(times=2)
    assert done == ["second"]


def test_chores_wait_for_sequences_and_adapters(setup, submit):
    served, done = setup(load_polls=99), []
    served.chores = [lambda: done.append("at last")]
    served.step(submit("running", max_tokens=3), times=3)
    served.step(submit("waiting", adapter="cold"), times=3)
    served.step(Cancel("waiting"))
    served.adapters.pending_loads = 1
    served.step(times=2)
    assert not done
    served.adapters.pending_loads = 0
    served.step()
    assert done == ["at last"]
