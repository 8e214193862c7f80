"""The figures of a run, against outcomes worked out by hand."""

from pathlib import Path

import pytest

from deltamux.bench import plot
from deltamux.bench.driver import Outcome
from deltamux.bench.report import Objective, summarize


def outcome(ttft: float, latency: float, hot: bool = True, error: str = "") -> Outcome:
    gaps = [(latency - ttft) / 4] * 4
    return Outcome("a", 0.0, 10, hot, 0 if error else 5, ttft, latency, gaps, error)


OUTCOMES = [outcome(0.1, 0.5), outcome(0.3, 0.7, hot=False), outcome(0, 0.01, error="NOT_FOUND")]


def test_throughput_counts_only_what_completed() -> None:
    summary = summarize(OUTCOMES, 2.0, Objective({}))
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert summary["errors_by_code"] == {"NOT_FOUND": 1}
    assert summary["output_throughput"] == 5.0
    assert summary["request_throughput"] == 1.0


def test_latencies_are_milliseconds_with_hot_and_cold_apart() -> None:
    summary = summarize(OUTCOMES, 2.0, Objective({}))
    assert summary["mean_ttft_ms"] == pytest.approx(200)
    assert summary["median_itl_ms"] == pytest.approx(100)
    assert summary["p99_e2el_ms"] == pytest.approx(698)
    assert summary["hot"]["mean_ttft_ms"] == pytest.approx(100)
    assert summary["cold"]["mean_ttft_ms"] == pytest.approx(300)


def test_goodput_counts_answers_that_keep_every_limit() -> None:
    objective = Objective.parse("ttft:200,e2el:600")
    assert summarize(OUTCOMES, 1.0, objective)["request_goodput"] == 1.0
    assert summarize(OUTCOMES, 1.0, Objective.parse("itl:50"))["request_goodput"] == 0.0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tokens:5", "^tokens is none of"),
        ("itl:5,itl:6", "^itl is none of .* there twice"),
        ("ttft", "^expected milliseconds behind ttft"),
        ("ttft:5,itl:fast", "^expected milliseconds behind itl"),
        ("ttft:nan", "^expected milliseconds"),
        ("ttft:0", "^expected milliseconds"),
    ],
)
def test_what_is_no_objective_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Objective.parse(text)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    summaries = [summarize(OUTCOMES, seconds, Objective({})) for seconds in (1.0, 2.0)]
    plot.draw(summaries, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
