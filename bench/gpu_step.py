"""Times a whole step of the engine's runner on a GPU, at Llama-3.1-8B's shape with random weights.

    python bench/gpu_step.py --json step.json
    python bench/gpu_step.py --dry-run --json step.json

Decode steps of the base alone and with an adapter of rank 16 on q_proj and v_proj for every row,
beside the time that it takes to read the weights once; and prompts. In bfloat16, with CUDA graphs.
`step` is what the engine waits for, `device` the step's work when it is queued without a gap.
There is no front end here, other than in gpu_serving.py. `--dry-run` takes a tiny shape on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_step import PROMPT, Steps
from gpu.plan import Machine
from gpu.report import conditions
from gpu.timing import machine
from serving.shape import LLAMA_8B, TINY
from serving.weights import make

from deltamux.engine.rehearsal import replays_agree
from deltamux.engine.replay.cuda_graphs import GraphCapture, StepGraphs
from deltamux.engine.replay.step_buffers import StepBuffers, StepShape

Slots = Sequence[int | None]

BATCHES = (1, 8, 32)
ROUNDS, REPLAYS = 40, 10
PREFILL = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="for the weights; made ones are kept and used")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on a CPU")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    shape = replace(TINY if arguments.dry_run else LLAMA_8B, ranks=(16,), adapters=(BATCHES[-1],))
    folder = arguments.folder or Path(tempfile.gettempdir()) / f"deltamux-step-{shape.name}"
    make(folder, shape, device)
    steps = Steps(folder, BATCHES[-1], device)
    result: dict[str, Any] = {"prompt": PROMPT}
    speed = None
    if device == "cuda":
        speed = machine()
        result |= {"conditions": conditions({}), "machine": vars(speed)}
        capture(steps)
    steps.prefill([None] * BATCHES[-1], PREFILL)  # from now on they decode
    result["decode"] = [
        {
            "batch": batch,
            "base": decode(steps, [None] * batch, speed),
            "distinct": decode(steps, list(range(batch)), speed),
        }
        for batch in BATCHES
    ]
    result["prefill"] = {
        "base": prefill(steps, [None] * BATCHES[-1]),
        "distinct": prefill(steps, list(range(BATCHES[-1]))),
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def capture(steps: Steps) -> None:
    """From now on the runner replays its steps."""
    shapes = (
        *(StepShape(batch, batch, decodes=True) for batch in BATCHES),
        StepShape(PREFILL, BATCHES[-1]),
    )
    base = steps.base
    buffers = StepBuffers(PREFILL, BATCHES[-1], steps.blocks, base.vocab_size, base.device)
    graphs = StepGraphs(
        shapes, steps.runner.logits, buffers, steps.sites, GraphCapture(base.device)
    )
    assert graphs.capture_base()
    assert replays_agree(graphs, steps.runner, base, PROMPT)
    steps.runner.use(graphs)


def decode(steps: Steps, slots: Slots, speed: Machine | None) -> dict[str, float]:
    """Milliseconds of a step of as many sequences, each with the adapter in its slot."""
    scheduled = steps.decoding(slots)
    found = {"step_ms": median_ms(lambda: steps.runner.run(scheduled))}
    if speed is not None:
        adapters = steps.sites.used_bytes * sum(slot is not None for slot in slots) // BATCHES[-1]
        found["device_ms"] = device_ms(lambda: steps.runner.launch(scheduled))
        found["floor_ms"] = 1e3 * (base_bytes(steps) + adapters) / speed.bytes_per_second
    return found


def base_bytes(steps: Steps) -> int:
    """Of the weights that every step reads: all but the embedding's."""
    embedding = steps.base.model.get_input_embeddings().weight
    return sum(p.nbytes for p in steps.base.model.parameters()) - embedding.nbytes


def prefill(steps: Steps, slots: Slots) -> float:
    """Tokens a second of all prompts, in steps of PREFILL tokens."""
    milliseconds = median_ms(lambda: steps.prefill(slots, PREFILL), rounds=5)
    return 1e3 * len(slots) * PROMPT / milliseconds


def median_ms(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])


def device_ms(work: Callable[[], object]) -> float:
    """Of one of several that are queued one behind the other."""
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return statistics.median(times)


if __name__ == "__main__":
    main()
