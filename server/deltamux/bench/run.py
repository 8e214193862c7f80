"""One benchmark from a config to its table, JSON file and picture."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deltamux.bench import plot
from deltamux.bench.backend import Backend, BackendError
from deltamux.bench.driver import Outcome, play
from deltamux.bench.report import Objective, summarize
from deltamux.bench.workload import Workload


@dataclass(frozen=True)
class BenchConfig:
    """What to send where, and where the figures go; one run for every rate in `rates`.

    `connect` is called within the event loop. The workload's `vocab_size`, and its adapters where
    it names none, are the server's.
    """

    connect: Callable[[], Backend]
    workload: Workload
    rates: tuple[float, ...]
    objective: Objective
    warmup: int = 0
    json_path: Path | None = None
    png_path: Path | None = None


def run(config: BenchConfig, console: Console) -> None:
    """Plays the workload at every rate; the summaries, on `console` and written as asked.

    Raises BackendError where not one request was answered.
    """
    summaries = asyncio.run(measure(config, Console(stderr=True)))
    console.print(_table(summaries))
    messages = {code: text for s in summaries for code, text in s["error_messages"].items()}
    for message in messages.values():
        console.print(f"failed, as one said: {message}")
    if config.json_path:
        config.json_path.write_text(json.dumps(summaries, indent=1) + "\n")
    if config.png_path:
        plot.draw(summaries, config.png_path)
    if not any(s["completed"] for s in summaries):
        raise BackendError("NO_ANSWER", "not one request was answered")


async def measure(config: BenchConfig, console: Console) -> list[dict[str, Any]]:
    """Plays the workload at every rate, the progress shown on `console`."""
    async with aclosing(config.connect()) as backend:
        workload = replace(config.workload, vocab_size=await backend.vocab_size())
        if not workload.adapters:
            workload = replace(workload, adapters=await backend.adapters())
        if config.warmup:
            warmup = replace(workload, requests=config.warmup, rate=float("inf"))
            await _play(backend, warmup, console)
        return [
            await _measure(backend, replace(workload, rate=rate), config.objective, console)
            for rate in config.rates
        ]


async def _measure(
    backend: Backend, workload: Workload, objective: Objective, console: Console
) -> dict[str, Any]:
    start = time.perf_counter()
    outcomes = await _play(backend, workload, console)
    duration = time.perf_counter() - start
    described = {k: v for k, v in asdict(workload).items() if k not in ("adapters", "rate")}
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": backend.name,
        "num_prompts": workload.requests,
        "num_adapters": len(workload.adapters),
        # JSON has no infinity; vLLM writes the word.
        "request_rate": workload.rate if isfinite(workload.rate) else "inf",
        "burstiness": workload.burstiness,
        "goodput_config": dict(objective.limits),
        "workload": described,
        **summarize(outcomes, duration, objective),
    }


async def _play(backend: Backend, workload: Workload, console: Console) -> list[Outcome]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(f"{workload.rate:g} requests/s", total=workload.requests)
        return await play(backend, workload.plan(), lambda outcome: progress.advance(bar))


def _table(summaries: list[dict[str, Any]]) -> Table:
    table = Table(title="latencies in milliseconds: median / p99", box=None, pad_edge=False)
    for heading in ("rate", "done", "failed", "req/s", "goodput/s", "out tok/s"):
        table.add_column(heading, justify="right")
    for heading in ("TTFT", "inter-token", "end to end", "TTFT hot", "TTFT cold"):
        table.add_column(heading, justify="right")
    for s in summaries:
        table.add_row(
            f"{float(s['request_rate']):g}",
            str(s["completed"]),
            str(s["failed"]),
            f"{s['request_throughput']:.2f}",
            f"{s['request_goodput']:.2f}",
            f"{s['output_throughput']:.1f}",
            *(_pair(s, name) for name in ("ttft", "itl", "e2el")),
            _pair(s["hot"], "ttft"),
            _pair(s["cold"], "ttft"),
        )
    return table


def _pair(figures: dict[str, Any], name: str) -> str:
    if f"median_{name}_ms" not in figures:
        return "-"
    return f"{figures[f'median_{name}_ms']:.0f} / {figures[f'p99_{name}_ms']:.0f}"
