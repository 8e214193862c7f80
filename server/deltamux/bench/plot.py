"""Draws latency against load from the summaries of several request rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PANELS = (("ttft", "time to first token"), ("itl", "inter-token latency"), ("e2el", "end to end"))


def draw(summaries: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG with one panel a latency: median and p99 in milliseconds over the request rate.

    Needs matplotlib, of the `bench` extra; raises ImportError without it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    rates = [summary["request_throughput"] for summary in summaries]
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for statistic in ("median", "p99"):
            values = [summary[f"{statistic}_{key}_ms"] for summary in summaries]
            axes.plot(rates, values, marker="o", label=statistic)
        axes.set(title=title, xlabel="completed requests a second", ylabel="milliseconds")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
