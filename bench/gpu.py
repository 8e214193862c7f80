"""Measures the adapters' kernels on a GPU against vLLM's, SGLang's and torch's, layer by layer.

    python bench/gpu.py --peers FOLDER --json gpu.json --markdown gpu.md
    python bench/gpu.py --dry-run

One command, at most nine minutes on an H100 or H200, without a network. First every op runs against
float64 in bfloat16; then CUDA graphs of 32 distinct layers of Llama-3.1-8B, all but attention in
place, are replayed in turn, and what an arm adds to the base alone is its figure. `--peers` is
described in gpu/peers.py; without it the peers are left out. `--dry-run` needs no GPU: it prints
launches, bytes and floors, and compiles.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu.correctness import compare_arms
from gpu.dry_run import dry_run
from gpu.measure import measure
from gpu.peers import Peers, load
from gpu.report import conditions, markdown
from gpu.shapes import TINY, Step
from gpu.timing import machine

ROOT = Path(__file__).parents[1]
OPS_SECONDS = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, help="folder of the unzipped peers")
    parser.add_argument("--peer-version", action="append", default=[], metavar="NAME=VERSION")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--markdown", type=Path, default=Path("gpu.md"))
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no step starts")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    arguments = parser.parse_args()
    if arguments.dry_run:
        dry_run()
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device; --dry-run needs none")
    else:
        deadline = time.monotonic() + 60 * arguments.minutes
        versions = dict(text.partition("=")[::2] for text in arguments.peer_version)
        with torch.inference_mode():
            result = run(arguments.peers, versions, deadline, arguments.json)
        arguments.markdown.write_text(markdown(result))
        print(arguments.markdown.read_text())


def run(
    peers_folder: Path | None, versions: dict[str, str], deadline: float, path: Path
) -> dict[str, Any]:
    """Writes to `path` after every step, so that an end by force keeps what was measured."""
    peers = load(peers_folder)
    result: dict[str, Any] = {
        "conditions": conditions(versions),
        "ops": ops_against_float64(),
        "arms": arms_against_float64(peers),
    }
    speed = machine()
    result["machine"] = vars(speed)
    result["steps"] = []
    for row in measure(peers, speed, deadline):
        result["steps"].append(row)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    return result


def arms_against_float64(peers: Peers) -> list[dict[str, Any]]:
    step, device = Step("decode", 37, "mixed", (8, 16, 32, 64)), torch.device("cuda")
    return [
        row | {"site": site.name}
        for site in TINY
        for row in compare_arms(site, step, peers, torch.bfloat16, device)
    ]


def ops_against_float64() -> str:
    """The last line of the ops' own tests, which run on the GPU where there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(ROOT)]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "-k", "triton"]
    command.append(str(ROOT / "tests/kernels"))
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=OPS_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done after {OPS_SECONDS} s"
    return (run.stdout or run.stderr).strip().splitlines()[-1]


if __name__ == "__main__":
    main()
