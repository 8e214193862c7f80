"""What can be known without a GPU: launches, bytes, floors, and that everything compiles."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from gpu.arms import Deltamux, Fused
from gpu.consumers import consumer
from gpu.plan import FORMS, Machine, adapter_bytes, floor_seconds, launches, sorted_ranks
from gpu.shapes import LLAMA, Step, steps
from gpu.weights import SiteWeights, exact

# Published figures of an H200, to have a floor to look at; the run measures its own.
H200 = Machine(4.3e12, 788e12)
COMPILE = Path(__file__).parents[2] / "tests/kernels/compile_kernels.py"


def dry_run() -> None:
    for step in steps():
        floors = [1e6 * floor_seconds(LLAMA, step, H200, fused=fused) for fused in (True, False)]
        megabytes = adapter_bytes(LLAMA, sorted_ranks(step)) / 1e6
        print(
            f"{step.name}: {megabytes:.1f} MB a layer, floor {floors[0]:.1f} us fused, "
            f"{floors[1]:.1f} us separate"
        )
    device = torch.device("cpu")
    step = Step("decode", 5, "mixed", (8, 16, 3))
    weights = [exact(site, step, torch.bfloat16, device) for site in LLAMA]
    for form in FORMS:
        counted = _launches(form, weights, step)
        planned = sum(launches(form, site) for site in LLAMA)
        print(f"{form}: {sum(counted.values())} launches a layer, planned {planned}: {counted}")
    counted = _launches_of_fused(weights, step)
    print(f"fused: {sum(counted.values())} launches, the consumers' own among them: {counted}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(COMPILE), "sm_90:bfloat16"]
    subprocess.run(command, env=environment, check=True)


def _launches(form: str, sites: list[SiteWeights], step: Step) -> Counter[str]:
    """By kernel, of a layer."""
    with _launches_counted() as counted:
        for number, site in enumerate(sites):
            x = torch.zeros(step.rows, site.shape.width, dtype=torch.bfloat16)
            y = torch.zeros(step.rows, sum(site.shape.outputs), dtype=torch.bfloat16)
            arm = Deltamux(sites, step, form)
            arm.before(number, x)
            arm.after(number, x, y)
    return counted


def _launches_of_fused(sites: list[SiteWeights], step: Step) -> Counter[str]:
    with _launches_counted() as counted:
        arm = Fused(sites, step)
        for number, site in enumerate(sites):
            arm.before(number, torch.zeros(step.rows, site.shape.width, dtype=torch.bfloat16))
            y = torch.zeros(step.rows, sum(site.shape.outputs), dtype=torch.bfloat16)
            arm.consume(number, y, consumer(site.shape, step.rows, y))
    return counted


@contextlib.contextmanager
def _launches_counted() -> Iterator[Counter[str]]:
    """Launches are counted and nothing runs."""
    counted: Counter[str] = Counter()
    run = JITFunction.run

    def count(self: Any, *_: object, **__: object) -> None:
        counted[self.__name__.strip("_")] += 1

    JITFunction.run = count
    try:
        yield counted
    finally:
        JITFunction.run = run
