"""Times the arms of one op over the layers of the 125 M model, and prints a report.

Every arm runs all layers in turn, so that adapters are cold in the cache as they are while serving.
Arms are interleaved, and the figure is the median of CPU time, which a busy machine distorts least.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from deltamux_kernels import Segments

# (input width, output widths of the layers that share the input) of the 125 M model's sites.
SITES = (
    (768, (768, 256, 256)),
    (768, (768,)),
    (768, (2048, 2048)),
    (2048, (768,)),
)
CPU = torch.device("cpu")


class Site:
    """The adapters of all slots at one site, in the form that each arm wants.

    An arm is a method `(x [T, K], ys each [T, N], segments)` that changes every y in place.
    """

    arms: ClassVar[tuple[str, ...]]
    # Those that only tell something when each adapter has one row.
    single_row_arms: ClassVar[tuple[str, ...]] = ()

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        raise NotImplementedError


def measure(
    kind: type[Site], layers: int, rows: int, adapters: int, repeats: int
) -> dict[str, object]:
    """Median milliseconds of each arm over all layers, beside the base's products."""
    per_adapter = rows // adapters
    sites = [kind(width, outputs, adapters) for _ in range(layers) for width, outputs in SITES]
    weights = [[torch.randn(n, width) for n in outputs] for width, outputs in SITES * layers]
    xs = {width: torch.randn(rows, width) for width, _ in SITES}
    ys = {outputs: [torch.zeros(rows, n) for n in outputs] for _, outputs in SITES}
    spans = [(slot, slot * per_adapter, (slot + 1) * per_adapter) for slot in range(adapters)]
    names = [name for name in kind.arms if per_adapter == 1 or name not in kind.single_row_arms]

    def base() -> None:
        for (width, outputs), own in zip(SITES * layers, weights, strict=True):
            for y, weight in zip(ys[outputs], own, strict=True):
                torch.mm(xs[width], weight.t(), out=y)

    def step(name: str) -> None:
        segments = Segments.build(spans, CPU)
        for site, (width, outputs) in zip(sites, SITES * layers, strict=True):
            getattr(site, name)(xs[width], ys[outputs], segments)

    works = {"base": base} | {name: lambda name=name: step(name) for name in names}
    medians = medians_of(works, repeats)
    return {
        "batch": rows,
        "adapters": adapters,
        "median_cpu_ms": {name: round(value, 2) for name, value in medians.items()},
        "adapters_over_base": {name: round(medians[name] / medians["base"], 3) for name in names},
    }


def medians_of(works: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time of each, run in turn; the first time does not count."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            samples[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(own[1:]) for name, own in samples.items()}


def bench_sites(kind: type[Site], description: str | None, layers: int = 12) -> None:
    """The command of one op: 16 rows of 16, 4 and 1 adapters."""

    def cases(repeats: int) -> list[dict[str, object]]:
        return [measure(kind, layers, 16, adapters, repeats) for adapters in (16, 4, 1)]

    command(description, cases, {"layers": layers})


def command(
    description: str | None,
    cases: Callable[[int], Sequence[dict[str, object]]],
    facts: dict[str, object],
) -> None:
    """Reads the arguments, measures, prints the report and writes it where it is asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        measured = list(cases(arguments.repeats))
    report = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        **facts,
        "cases": measured,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
