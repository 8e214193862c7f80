"""Measures a thousand adapters that do not fit into the slots: the S-LoRA workload in small.

Usage: python bench/peers/scale.py adapters|slots FOLDER [--rounds 3] [--json FILE] [--png FILE]

`adapters`: throughput with 1, 10, 100 and 1000 adapters on 32 slots, all requests due at once and
their adapters drawn by Zipf(1.0); first as a server meets them, some new in every round, then the
same with all in the host's memory, where S-LoRA's are from the start. `slots`: the time to the
first token of 16 adapters on 8 slots and on 16, with Poisson arrivals. FOLDER is made first if it
is not there: a seeded random Llama of 10 M parameters and a thousand LoRA adapters of ranks 8 to
64, 1.3 GB. Figures are medians over rounds in which the cells take turns. Adds to the figures that
FILE has, and draws all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import model
import torch
from matplotlib.figure import Figure
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from deltamux.bench import driver
from deltamux.bench.driver import Outcome
from deltamux.bench.grpc_backend import GrpcBackend
from deltamux.bench.report import Objective, summarize
from deltamux.bench.workload import Lengths, PlannedRequest, Workload
from deltamux.client import Client, generate_request
from deltamux.demo.server import Server

CONFIG = LlamaConfig(
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1024,
    vocab_size=8000,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    dtype="float32",
    architectures=["LlamaForCausalLM"],
)
ATTENTION = {name: sizes for name, sizes in model.linears(CONFIG).items() if "self_attn" in name}
# In an order that keeps the mean rank of a request near 30, however many adapters there are.
RANKS = (32, 16, 64, 8)
COUNTS = (1, 10, 100, 1000)
SLOTS = 32
FEW_ADAPTERS = 16
FEW_SLOTS = (16, 8)
# Of the requests a second that `adapters` completes: loads at which `slots` is measured.
RATES = (5.0, 10.0)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"s{index:04d}" for index in range(count))


def make(folder: Path) -> None:
    if not (folder / "base" / "tokenizer.json").exists():
        print("making the base model", flush=True)
        model.make_base(folder / "base", CONFIG)
    for index, name in enumerate(names(max(COUNTS))):
        adapter = folder / "adapters" / name
        if not (adapter / "adapter_model.safetensors").exists():
            model.make_adapter(index, adapter, RANKS, CONFIG.num_hidden_layers, ATTENTION)


@contextmanager
def serving(folder: Path, slots: int, threads: int) -> Iterator[str]:
    """Where a server of all adapters listens, with at most SLOTS sequences in a step."""
    arguments = ["--model", str(folder / "base"), "--adapter-dir", str(folder / "adapters")]
    arguments += ["--max-adapter-slots", str(slots), "--max-num-seqs", str(SLOTS)]
    arguments += ["--threads", str(threads), "--no-enable-prefix-caching"]
    with (
        tempfile.TemporaryDirectory() as cache,
        Server(*arguments, "--adapter-cache-dir", cache) as server,
    ):
        yield server.target


def play(target: str, plan: list[PlannedRequest]) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with aclosing(GrpcBackend(target)) as backend:
            return await driver.play(backend, plan)

    outcomes = asyncio.run(run())
    assert not any(outcome.error for outcome in outcomes), "requests failed"
    return outcomes


def workload(count: int, requests: int, rate: float, popularity: str, seed: int) -> Workload:
    return Workload(
        adapters=names(count),
        requests=requests,
        rate=rate,
        popularity=popularity,
        prompt_lengths=Lengths(32, 128),
        output_lengths=Lengths(32, 64),
        vocab_size=CONFIG.vocab_size,
        seed=seed,
    )


def measured(target: str, work: Workload) -> dict[str, float]:
    start = time.perf_counter()
    outcomes = play(target, work.plan())
    summary = summarize(outcomes, time.perf_counter() - start, Objective({}))
    figures = {
        "tokens_per_second": summary["output_throughput"],
        "requests_per_second": summary["request_throughput"],
        "median_ttft_ms": summary["median_ttft_ms"],
        "p99_ttft_ms": summary["p99_ttft_ms"],
        "on_device": summary["hot"]["completed"] / work.requests,
    }
    print(work.rate, len(work.adapters), {k: round(v, 2) for k, v in figures.items()}, flush=True)
    return figures


def check_one(target: str, folder: Path) -> None:
    """The greedy tokens of the last adapter, over gRPC, are those of PEFT."""
    name, prompt, count = names(max(COUNTS))[-1], list(range(100, 140)), 24
    tuned = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapters" / name
    )
    wanted = tuned.generate(
        input_ids=torch.tensor([prompt]), do_sample=False, eos_token_id=None, max_new_tokens=count
    )
    with Client(target) as client:
        request = generate_request(
            prompt, adapter=name, max_tokens=count, temperature=0.0, ignore_eos=True
        )
        got = client.generate(request).token_ids
    assert list(got) == wanted[0, len(prompt) :].tolist(), "not what PEFT gives"


def measure_adapters(folder: Path, rounds: int, requests: int, threads: int) -> list[Any]:
    """One row a number of adapters, some of them new or all in the host's memory."""
    runs: dict[tuple[bool, int], list[dict[str, float]]] = {}
    with serving(folder, SLOTS, threads) as target:
        check_one(target, folder)
        # In a round before the first, the server has seen none of them.
        for number in range(rounds + 1):
            for count in COUNTS:
                figures = measured(target, saturating(count, requests, number))
                if number:
                    runs.setdefault((False, count), []).append(figures)
        ask_each(target)
        for number in range(1, rounds + 1):
            for count in COUNTS:
                figures = measured(target, saturating(count, requests, number))
                runs.setdefault((True, count), []).append(figures)
    return [
        {"adapters": count, "on_host": on_host, **medians(found)}
        for (on_host, count), found in runs.items()
    ]


def saturating(count: int, requests: int, seed: int) -> Workload:
    return workload(count, requests, float("inf"), "zipf:1.0", seed)


def ask_each(target: str) -> None:
    with Client(target) as client:
        for name in names(max(COUNTS)):
            client.generate(generate_request([5, 6, 7], adapter=name, max_tokens=1))


def measure_slots(folder: Path, rounds: int, requests: int, threads: int) -> list[Any]:
    """One row a number of slots and a rate."""
    runs: dict[tuple[int, float], list[dict[str, float]]] = {}
    for slots in FEW_SLOTS:
        with serving(folder, slots, threads) as target:
            measured(target, workload(FEW_ADAPTERS, FEW_ADAPTERS, float("inf"), "distinct", seed=0))
            for number in range(rounds):
                for rate in RATES:
                    work = workload(FEW_ADAPTERS, requests, rate, "uniform", seed=number)
                    runs.setdefault((slots, rate), []).append(measured(target, work))
    return [
        {"slots": slots, "rate": rate, **medians(found)} for (slots, rate), found in runs.items()
    ]


def medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        **{key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]},
        "tokens_per_second_all": [round(run["tokens_per_second"], 1) for run in runs],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for on_host, label in ((True, "all in the host's memory"), (False, "some new to the server")):
        rows = [row for row in result.get("adapters", []) if row["on_host"] == on_host]
        counts, rates = [r["adapters"] for r in rows], [r["tokens_per_second"] for r in rows]
        left.plot(counts, rates, marker="o", label=label)
    left.legend()
    left.set(title=f"{SLOTS} slots, saturated", xlabel="adapters", ylabel="tokens a second")
    left.set_xscale("log")
    for slots in FEW_SLOTS:
        rows = [row for row in result.get("slots", []) if row["slots"] == slots]
        rates, times = [r["rate"] for r in rows], [r["median_ttft_ms"] for r in rows]
        right.plot(rates, times, marker="o", label=f"{slots} slots")
    right.set(title=f"{FEW_ADAPTERS} adapters", xlabel="requests a second")
    right.set_ylabel("median time to first token, ms")
    right.legend()
    for axes in (left, right):
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=128, help="in a cell of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    make(args.folder)
    rows = PARTS[args.part](args.folder, args.rounds, args.requests, args.threads)
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    result = {
        **known,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio")},
        args.part: rows,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.png:
        draw(result, args.png)


PARTS = {"adapters": measure_adapters, "slots": measure_slots}

if __name__ == "__main__":
    main()
