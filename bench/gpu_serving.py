"""Loads deltamux, and vLLM, with the same requests for up to 1000 adapters of Llama-3.1-8B's shape.

    python bench/gpu_serving.py --json serving.json
    python bench/gpu_serving.py --json serving-vllm.json --vllm-python PATH
    python bench/gpu_serving.py --dry-run --json serving.json

One command an engine, at most nine minutes on a GPU of 80 GB, without a network: it makes random
weights in `--folder` (16 GB of base, 26 GB of adapters, ranks 8 to 64 on q_proj and v_proj), starts
the server, and sends seeded open-loop load, rate after rate, that asks for 1, 32, 256 and 1000
adapters by Zipf's law. `--dry-run` does the same with a tiny shape on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from serving.servers import deltamux, vllm
from serving.shape import LLAMA_8B, TINY, Shape
from serving.weights import adapter_names, make

from deltamux.bench.backend import Backend
from deltamux.bench.report import Objective
from deltamux.bench.run import BenchConfig, measure
from deltamux.bench.workload import Workload


def main() -> None:
    args = arguments()
    began = time.monotonic()
    shape = TINY if args.dry_run else LLAMA_8B
    device = "cpu" if args.dry_run else "cuda"
    folder = args.folder or Path(tempfile.gettempdir()) / f"deltamux-{shape.name}"
    make(folder, shape, device)
    result: dict[str, Any] = {
        "conditions": conditions(args.vllm_python is not None, shape, device),
        "seconds_of_weights": round(time.monotonic() - began, 1),
        "runs": [],
    }
    with engine(args.vllm_python, folder, shape, device) as connect:
        result["seconds_until_ready"] = round(time.monotonic() - began, 1)
        for run in runs(connect, shape, began + 60 * args.minutes):
            result["runs"].append(run)
            args.json.write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="written after every rate")
    parser.add_argument("--folder", type=Path, help="for the weights; made ones are kept and used")
    parser.add_argument("--vllm-python", type=Path, help="loads vLLM of this interpreter instead")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no rate starts")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on a CPU")
    return parser.parse_args()


def engine(
    vllm_python: Path | None, folder: Path, shape: Shape, device: str
) -> AbstractContextManager[Callable[[], Backend]]:
    if vllm_python is None:
        return deltamux(folder, shape, device)
    return vllm(vllm_python, folder, shape, device)


def runs(connect: Callable[[], Backend], shape: Shape, deadline: float) -> Iterator[dict[str, Any]]:
    """One for every number of adapters and rate, figures without the single requests' times."""
    for count, rate in product(shape.adapters, shape.rates):
        if time.monotonic() > deadline:
            print(f"no time left for {count} adapters at {rate:g} requests/s", flush=True)
            continue
        workload = Workload(
            adapters=adapter_names(count),
            requests=max(1, round(rate * shape.seconds)),
            rate=rate,
            popularity="zipf:1.0",
            prompt_lengths=shape.prompt_lengths,
            output_lengths=shape.output_lengths,
        )
        # Nobody has asked for these adapters before their first rate.
        warmup = min(count, shape.slots) if rate == shape.rates[0] else 0
        config = BenchConfig(connect, workload, (rate,), Objective({}), warmup)
        [summary] = asyncio.run(measure(config, Console(stderr=True)))
        print(
            f"{count} adapters, {rate:g} requests/s: {summary['completed']} done, "
            f"{summary['failed']} failed, {summary['output_throughput']:.1f} tokens/s",
            flush=True,
        )
        yield {key: value for key, value in summary.items() if not isinstance(value, list)}


def conditions(of_vllm: bool, shape: Shape, device: str) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "engine": "vllm" if of_vllm else "deltamux",
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "shape": shape.name,
        "ranks": shape.ranks,
        "targets": shape.targets,
        "slots": shape.slots,
    }


if __name__ == "__main__":
    main()
