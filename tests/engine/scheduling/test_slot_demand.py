"""More adapters than slots: who waits, who drains, and that nobody starves."""

from itertools import permutations

import pytest

from deltamux.engine.scheduling import drain
from deltamux.errors import InvalidArgument
from deltamux.wire.messages import Sampling


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


def test_no_more_adapters_are_asked_for_than_there_are_slots(setup, new_sequence):
    """However many wait: those in front get the slots. Who joins an adapter in its slot does so."""
    engine = setup(slots=2, load_polls=3)
    engine.adapters.load_polls = 0
    engine.adapters.acquire("there", "", "Generate")
    engine.adapters.release("there")
    engine.adapters.load_polls = 3
    asked, acquire = [], engine.adapters.acquire
    engine.adapters.acquire = lambda *asking: asked.append(asking[0]) or acquire(*asking)
    absent = [new_sequence(adapter=f"absent-{number}") for number in range(50)]
    base, joins = new_sequence(), new_sequence(adapter="there")
    engine.add(*absent, base, joins)
    assert set(engine.step()) == {base, joins}
    assert asked == ["absent-0", "absent-1", "there"]
    assert {sequence.adapter_missed for sequence in absent} == {0.1}
    engine.steps_until(engine.is_empty, limit=1000)
    assert [s.admitted for s in absent] == sorted(s.admitted for s in absent)


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
    assert not bad.blocks and bad in engine.scheduler.waiting


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
