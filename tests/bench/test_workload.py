"""The plan of a workload: seeded, with the arrivals and popularities that it promises."""

import numpy as np
import pytest

from deltamux.bench.workload import Lengths, Workload, arrivals, popularity

ADAPTERS = tuple(f"a{i}" for i in range(10))


def test_a_seed_repeats_the_plan_and_another_changes_it() -> None:
    workload = Workload(ADAPTERS, requests=50, rate=10.0, popularity="zipf:1.2", seed=3)
    assert workload.plan() == workload.plan()
    other = Workload(ADAPTERS, requests=50, rate=10.0, popularity="zipf:1.2", seed=4)
    assert workload.plan() != other.plan()


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float, variation: float) -> None:
    due = np.array(arrivals(np.random.default_rng(0), 40_000, 20.0, burstiness))
    gaps = np.diff(due)
    assert due[0] == 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_an_infinite_rate_is_due_at_once() -> None:
    assert set(arrivals(np.random.default_rng(0), 5, float("inf"), 1.0)) == {0.0}


def shares(name: str) -> np.ndarray:
    chosen = popularity(name)(np.random.default_rng(1), 10, 50_000)
    return np.bincount(chosen, minlength=10) / 50_000


def test_popularities_are_the_named_distributions() -> None:
    assert shares("identical")[0] == 1.0
    assert set(shares("distinct")) == {0.1}
    assert shares("uniform") == pytest.approx(np.full(10, 0.1), abs=0.01)
    zipf = 1 / np.arange(1, 11) ** 1.5
    assert shares("zipf:1.5") == pytest.approx(zipf / zipf.sum(), abs=0.01)


@pytest.mark.parametrize("name", ["fair", "uniform:3", "zipf:x", "zipf:", "zipf:-1", "zipf:inf"])
def test_an_unknown_popularity_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^expected .*zipf:A"):
        popularity(name)


def test_lengths_and_ids_stay_in_range() -> None:
    workload = Workload(
        ADAPTERS,
        200,
        1.0,
        prompt_lengths=Lengths(3, 9),
        output_lengths=Lengths(1, 4),
        vocab_size=40,
    )
    for request in workload.plan():
        assert 3 <= len(request.prompt) <= 9
        assert 1 <= request.max_tokens <= 4
        assert all(16 <= token < 40 for token in request.prompt)


@pytest.mark.parametrize("text", ["0", "5:2", "-1:4", "x", "3:", ":3", "1:2:3", "1.5"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^expected a number of tokens, or LOW:HIGH"):
        Lengths.parse(text)


def test_no_adapters_means_the_base() -> None:
    assert {request.adapter for request in Workload((), 4, 1.0).plan()} == {""}
