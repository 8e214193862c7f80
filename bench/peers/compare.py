"""Measures deltamux over gRPC beside transformers, PEFT, llama.cpp and vLLM, on the same prompts.

Usage: python bench/peers/compare.py [--rounds 5] [--batch 1 8 16] [--share-prefixes] [--json FILE]
           [--llama-server PATH] [--vllm-python PATH]

A cell counts only when its greedy tokens equal the reference's (plain transformers for the base,
PEFT's `adapter_names` otherwise). Figures are medians over rounds; peers take turns within a round,
all with as many threads. With `--share-prefixes` prompts begin with the same 96 of 128 tokens and
the peers that can remember them may. README.md says how llama.cpp and vLLM are installed; without
them they are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path

import model
from deltamux_server import DeltamuxServer
from llama_server import LlamaServer
from measure import PEFT, PLAIN, measure
from peer import Peer, Worker
from report import ratios, rows, table
from workload import ADAPTERS, MODES, Cell


def main() -> None:
    args = arguments()
    model.make(args.model)
    cells = [
        Cell(mode, batch, args.share_prefixes) for batch in sorted(args.batch) for mode in args.mode
    ]
    with ExitStack() as stack:
        peers = [stack.enter_context(closing(peer)) for peer in start(args)]
        found = rows(cells, peers, measure(cells, peers, args.rounds))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": args.threads,
        "rounds": args.rounds,
        "shared_prefixes": args.share_prefixes,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio")},
        "peers": {peer.name: peer.version for peer in peers},
        "rows": found,
        "deltamux / peer": ratios(found),
    }
    print(table(found))
    print(json.dumps(result["deltamux / peer"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--share-prefixes", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", type=Path, default=model.FOLDER)
    parser.add_argument("--llama-server", type=Path, help="the program; needs MODEL/gguf")
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of vLLM's environment")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def start(args: argparse.Namespace) -> Iterator[Peer]:
    """The references first; says which peers are left out."""
    folder, threads = args.model, args.threads
    for name, kind in ((PLAIN, "plain"), (PEFT, "peft")):
        command = [sys.executable, "huggingface.py", kind, folder, ADAPTERS, threads]
        yield Worker(name, command, {"OMP_NUM_THREADS": str(threads)})
    yield DeltamuxServer(folder, range(ADAPTERS), threads, cache_prefixes=args.share_prefixes)
    if args.llama_server:
        yield LlamaServer(args.llama_server, folder, threads, cache_prefixes=args.share_prefixes)
    else:
        print("llama.cpp is left out: --llama-server PATH, see bench/peers/README.md")
    if args.vllm_python:
        yield vllm(args.vllm_python, folder, threads, cache_prefixes=args.share_prefixes)
    else:
        print("vLLM is left out: --vllm-python PATH, see bench/peers/README.md")


def vllm(python: Path, folder: Path, threads: int, *, cache_prefixes: bool) -> Worker:
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    cache = "cache" if cache_prefixes else "no-cache"
    command = [python, "vllm_worker.py", folder, cache]
    return Worker("vLLM", command, environment, caches_prefixes=cache_prefixes)


if __name__ == "__main__":
    main()
