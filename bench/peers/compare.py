"""Measures deltamux over gRPC beside plain transformers and PEFT, interleaved, on the same prompts.

Usage: python bench/peers/compare.py [--rounds 5] [--batch 1 8 16] [--json FILE]

A cell counts only when its greedy tokens equal the reference's (plain transformers for the base,
PEFT's `adapter_names` otherwise). Figures are medians over rounds; peers take turns within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import grpc
import model
from workload import MODES, NEW_TOKENS, Cell, adapter_name

from deltamux.v1 import control_pb2, control_pb2_grpc
from deltamux.v1 import inference_pb2 as pb
from deltamux.v1 import inference_pb2_grpc as rpc

HERE = Path(__file__).parent
PORT = 50717


class Peer(Protocol):
    name: str

    def serve(self, cell: Cell) -> dict[str, Any]:
        """Wall seconds in all (`seconds`), of the prefill, and each request's new tokens."""

    def close(self) -> None: ...


class HuggingFace:
    """transformers' generate in a process of its own; `kind` is plain or peft."""

    def __init__(self, kind: str, folder: Path, adapters: int, threads: int) -> None:
        self.name = {"plain": "transformers", "peft": "transformers + PEFT"}[kind]
        command = [sys.executable, HERE / "huggingface.py", kind, folder, adapters, threads]
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._reply()

    def serve(self, cell: Cell) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(cell)) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class Deltamux:
    """A real `deltamux serve` and a gRPC client on the same machine."""

    name = "deltamux"

    def __init__(self, folder: Path, adapters: Iterable[int], threads: int) -> None:
        self._cache = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "deltamux", "serve", "--model", str(folder / "base")]
        command += ["--port", str(PORT), "--metrics-port", "0", "--threads", str(threads)]
        command += ["--adapter-cache-dir", self._cache.name, "--log-level", "warning"]
        # The rounds repeat their prompts, which no other peer remembers.
        command += ["--no-enable-prefix-caching"]
        for name in map(adapter_name, adapters):
            command += ["--adapter", f"{name}={folder / 'adapters' / name}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        with grpc.insecure_channel(f"localhost:{PORT}") as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            for _ in range(240):
                if self._process.poll() is not None:
                    raise RuntimeError("deltamux serve ended")
                try:
                    stub.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=1)
                    return
                except grpc.RpcError:
                    time.sleep(0.5)
        raise RuntimeError("deltamux serve did not become ready")

    def serve(self, cell: Cell) -> dict[str, Any]:
        return asyncio.run(self._serve(cell))

    async def _serve(self, cell: Cell) -> dict[str, Any]:
        async with grpc.aio.insecure_channel(f"localhost:{PORT}") as channel:
            await channel.channel_ready()
            stub = rpc.InferenceServiceStub(channel)
            start = time.perf_counter()
            pairs = zip(cell.prompts, cell.adapters, strict=True)
            answers = await asyncio.gather(
                *(self._answer(stub, prompt, index) for prompt, index in pairs)
            )
            end = time.perf_counter()
        return {
            "seconds": end - start,
            "prefill_seconds": max(first for first, _ in answers) - start,
            "tokens": [tokens for _, tokens in answers],
        }

    @staticmethod
    async def _answer(stub: Any, prompt: list[int], index: int | None) -> tuple[float, list[int]]:
        request = pb.GenerateRequest(
            adapter="" if index is None else adapter_name(index),
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StoppingCriteria(max_tokens=NEW_TOKENS, ignore_eos=True),
            output=pb.OutputOptions(return_token_ids=True),
        )
        tokens: list[int] = []
        first = 0.0
        async for response in stub.Generate(request):
            tokens += response.token_ids
            first = first or (time.perf_counter() if tokens else 0.0)
        return first, tokens

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._cache.cleanup()


def peers_for(cell: Cell, peers: list[Peer]) -> list[Peer]:
    """Plain transformers serves the base alone; PEFT is wanted where there are adapters."""
    absent = "transformers + PEFT" if cell.mode == "base" else "transformers"
    return [peer for peer in peers if peer.name != absent]


def measure(cells: list[Cell], peers: list[Peer], rounds: int) -> dict[tuple[Cell, str], list[Any]]:
    runs: dict[tuple[Cell, str], list[Any]] = {}
    for round_number in range(-1, rounds):  # the first round warms up and is thrown away
        for cell in cells:
            for peer in peers_for(cell, peers):
                run = peer.serve(cell)
                rate = cell.batch * NEW_TOKENS / run["seconds"]
                print(f"round {round_number:2d}  {cell.mode:8s} B={cell.batch:<3d}", end="")
                print(f"{peer.name:22s} {rate:7.1f} tok/s", flush=True)
                if round_number >= 0:
                    runs.setdefault((cell, peer.name), []).append(run)
    return runs


def summarize(cell: Cell, name: str, runs: list[Any], reference: list[Any]) -> dict[str, Any]:
    equal = sum(a == b for a, b in zip(runs[0]["tokens"], reference[0]["tokens"], strict=True))
    seconds = [run["seconds"] for run in runs]
    decode = [run["seconds"] - run["prefill_seconds"] for run in runs]
    tokens = cell.batch * NEW_TOKENS
    return {
        "mode": cell.mode,
        "batch": cell.batch,
        "peer": name,
        "rows_equal_to_reference": f"{equal}/{cell.batch}",
        "tokens_per_second": round(tokens / statistics.median(seconds), 2),
        "tokens_per_second_all": [round(tokens / s, 2) for s in seconds],
        "decode_tokens_per_second": round(
            cell.batch * (NEW_TOKENS - 1) / statistics.median(decode), 2
        ),
        "prefill_seconds": round(statistics.median(r["prefill_seconds"] for r in runs), 3),
    }


def ratios(rows: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """The ratios that matter at one batch size, of tokens per second end to end."""
    rate = {(r["mode"], r["peer"]): r["tokens_per_second"] for r in rows if r["batch"] == batch}
    own_base = rate["base", "deltamux"]
    return {
        "distinct / PEFT": rate["distinct", "deltamux"] / rate["distinct", "transformers + PEFT"],
        "base / transformers": own_base / rate["base", "transformers"],
        "distinct / own base": rate["distinct", "deltamux"] / own_base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", type=Path, default=model.FOLDER)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model.make(args.model)
    adapters = max(4, *args.batch)
    peers: list[Peer] = [
        HuggingFace("plain", args.model, adapters, args.threads),
        HuggingFace("peft", args.model, adapters, args.threads),
        Deltamux(args.model, range(adapters), args.threads),
    ]
    cells = [Cell(mode, batch) for batch in args.batch for mode in MODES]
    try:
        runs = measure(cells, peers, args.rounds)
    finally:
        for peer in peers:
            peer.close()
    rows = []
    for cell in cells:
        reference = runs[cell, peers_for(cell, peers)[0].name]
        for peer in peers_for(cell, peers):
            rows.append(summarize(cell, peer.name, runs[cell, peer.name], reference))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": args.threads,
        "rounds": args.rounds,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio")},
        "rows": rows,
        "ratios": {f"B={batch}": ratios(rows, batch) for batch in args.batch},
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
