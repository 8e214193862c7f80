"""One benchmark from a config to its table, JSON file and picture."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deltamux.bench import plot
from deltamux.bench.driver import Driver
from deltamux.bench.report import Objective, summarize
from deltamux.bench.workload import Workload
from deltamux.v1 import adapters_pb2, adapters_pb2_grpc, control_pb2, control_pb2_grpc


@dataclass(frozen=True)
class BenchConfig:
    """What to send where, and where the figures go; one run for every rate in `rates`."""

    target: str
    workload: Workload
    rates: tuple[float, ...]
    objective: Objective
    warmup: int = 0
    # Where the AdapterService listens when not on `target`.
    admin_target: str | None = None
    json_path: Path | None = None
    png_path: Path | None = None


def run(config: BenchConfig) -> list[dict[str, Any]]:
    """Plays the workload at every rate and returns the summaries, printed and written as asked."""
    console = Console()
    summaries = asyncio.run(_run(config, console))
    console.print(_table(summaries))
    if config.json_path:
        config.json_path.write_text(json.dumps(summaries, indent=1) + "\n")
    if config.png_path:
        plot.draw(summaries, config.png_path)
    return summaries


async def _run(config: BenchConfig, console: Console) -> list[dict[str, Any]]:
    info = await _server_info(config.target)
    workload = replace(config.workload, vocab_size=info.vocab_size)
    if not workload.adapters:
        workload = replace(workload, adapters=await _all_adapters(config))
    if config.warmup:
        await _play(config, replace(workload, requests=config.warmup, rate=float("inf")), console)
    return [await _measure(config, replace(workload, rate=rate), console) for rate in config.rates]


async def _measure(config: BenchConfig, workload: Workload, console: Console) -> dict[str, Any]:
    start = time.perf_counter()
    outcomes = await _play(config, workload, console)
    duration = time.perf_counter() - start
    described = {k: v for k, v in asdict(workload).items() if k != "adapters"}
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "deltamux",
        "num_prompts": workload.requests,
        "num_adapters": len(workload.adapters),
        "request_rate": workload.rate,
        "burstiness": workload.burstiness,
        "goodput_config": dict(config.objective.limits),
        "workload": described,
        **summarize(outcomes, duration, config.objective),
    }


async def _play(config: BenchConfig, workload: Workload, console: Console) -> Any:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(f"{workload.rate:g} requests/s", total=workload.requests)
        async with Driver(config.target, lambda outcome: progress.advance(bar)) as driver:
            return await driver.play(workload.plan())


async def _server_info(target: str) -> control_pb2.GetServerInfoResponse:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        request = control_pb2.GetServerInfoRequest()
        info: control_pb2.GetServerInfoResponse = await stub.GetServerInfo(request, timeout=10)
        return info


async def _all_adapters(config: BenchConfig) -> tuple[str, ...]:
    """Names of the server's adapters, following its pages."""
    names: list[str] = []
    async with grpc.aio.insecure_channel(config.admin_target or config.target) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        token = ""
        while True:
            request = adapters_pb2.ListAdaptersRequest(page_size=1000, page_token=token)
            page = await stub.ListAdapters(request, timeout=30)
            names += [adapter.name for adapter in page.adapters if adapter.live]
            token = page.next_page_token
            if not token:
                return tuple(names)


def _table(summaries: list[dict[str, Any]]) -> Table:
    table = Table(title="latencies in milliseconds: median / p99")
    for heading in ("rate", "done", "failed", "req/s", "goodput/s", "out tok/s"):
        table.add_column(heading, justify="right")
    for heading in ("TTFT", "inter-token", "end to end", "TTFT hot", "TTFT cold"):
        table.add_column(heading, justify="right")
    for s in summaries:
        table.add_row(
            f"{s['request_rate']:g}",
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
