"""Times the low-rank ops of one decode step on the CPU against other ways to do the same.

Every arm runs the same 12 layers of the 125 M model in turn, so that adapters are cold in the
cache as they are while serving. Arms are interleaved, and the figure is the median of CPU time,
which a busy machine distorts least.

    python bench/bench_low_rank.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from deltamux_kernels import ALIGNMENT, Columns, PackedMatrices, Segments, expand, shrink

LAYERS = 12
RANKS = (4, 8, 16, 32)
# (input width, output widths of the layers that share the input) of the 125 M model's sites.
SITES = (
    (768, (768, 256, 256)),
    (768, (768,)),
    (768, (2048, 2048)),
    (2048, (768,)),
)


@dataclass(frozen=True)
class Layer:
    """One layer that reads a shared input: its base weight and each adapter's A and B."""

    weight: torch.Tensor  # [N, K]
    a: list[torch.Tensor]  # per slot [rank, K]
    b: list[torch.Tensor]  # per slot [rank, N]


class Site:
    """Layers that share an input, with their adapters packed and, for one arm, padded."""

    def __init__(self, width: int, outputs: tuple[int, ...], ranks: list[int]) -> None:
        self.layers = [
            Layer(
                torch.randn(n, width) * width**-0.5,
                [torch.randn(rank, width) for rank in ranks],
                [torch.randn(rank, n) * 0.01 for rank in ranks],
            )
            for n in outputs
        ]
        slots, device = len(ranks), torch.device("cpu")
        step = math.lcm(ALIGNMENT, width, *outputs)
        elements = sum(rank * (width + n) + 2 * step for rank in ranks for n in outputs)
        arena, self._end = torch.empty(elements), 0
        self.a = PackedMatrices(arena, slots, width)
        self.b = [PackedMatrices(arena, slots, n) for n in outputs]
        self.columns = [Columns(slots, device) for _ in outputs]
        for slot, rank in enumerate(ranks):
            self._write(self.a, slot, torch.cat([layer.a[slot] for layer in self.layers]))
            for index, layer in enumerate(self.layers):
                self._write(self.b[index], slot, layer.b[slot])
                self.columns[index].set(slot, index * rank)
        self.padded = [
            (_padded(layer.a).transpose(1, 2).contiguous(), _padded(layer.b))
            for layer in self.layers
        ]

    def _write(self, packed: PackedMatrices, slot: int, matrix: torch.Tensor) -> None:
        self._end = -(-self._end // packed.alignment) * packed.alignment
        packed.write(slot, self._end, matrix)
        self._end += matrix.numel()


def _padded(matrices: list[torch.Tensor]) -> torch.Tensor:
    most = max(matrix.shape[0] for matrix in matrices)
    stacked = torch.zeros(len(matrices), most, matrices[0].shape[1])
    for rows, matrix in zip(stacked, matrices, strict=True):
        rows[: matrix.shape[0]] = matrix
    return stacked


def base(site: Site, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
    for layer, y in zip(site.layers, ys, strict=True):
        torch.mm(x, layer.weight.t(), out=y)


def deltamux(site: Site, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
    h = shrink(x, site.a, segments)
    for y, b, columns in zip(ys, site.b, site.columns, strict=True):
        expand(y, h, b, columns, segments)


def loop_over_adapters(
    site: Site, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments
) -> None:
    """What PEFT does for mixed batches: each layer, each adapter, rows picked by index."""
    for layer, y in zip(site.layers, ys, strict=True):
        for slot, start, end in segments.spans:
            rows = torch.arange(start, end)
            y[rows] += x[rows] @ layer.a[slot].t() @ layer.b[slot]


def padded_bmm(site: Site, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
    """Every adapter padded to the largest rank; one row each, so no gather is needed."""
    for (a, b), y in zip(site.padded, ys, strict=True):
        y += torch.bmm(torch.bmm(x[:, None], a), b)[:, 0]


ARMS: dict[str, Callable[[Site, torch.Tensor, list[torch.Tensor], Segments], None]] = {
    "base": base,
    "deltamux": deltamux,
    "loop_over_adapters": loop_over_adapters,
    "padded_bmm": padded_bmm,
}


def measure(rows_per_adapter: int, batch: int, repeats: int) -> dict[str, object]:
    """Median milliseconds of each arm over all layers, and ratios to the base GEMMs."""
    slots = batch // rows_per_adapter
    ranks = [RANKS[slot % len(RANKS)] for slot in range(slots)]
    sites = [Site(width, outputs, ranks) for _ in range(LAYERS) for width, outputs in SITES]
    spans = [
        (slot, slot * rows_per_adapter, (slot + 1) * rows_per_adapter) for slot in range(slots)
    ]
    xs = {width: torch.randn(batch, width) for width, _ in SITES}
    ys = {outputs: [torch.zeros(batch, n) for n in outputs] for _, outputs in SITES}
    shapes = [shape for _ in range(LAYERS) for shape in SITES]
    seconds: dict[str, list[float]] = {
        name: [] for name in ARMS if name != "padded_bmm" or rows_per_adapter == 1
    }
    for _ in range(repeats + 1):
        for name, samples in seconds.items():
            start = time.process_time()
            segments = Segments.build(spans, torch.device("cpu"))
            for site, (width, outputs) in zip(sites, shapes, strict=True):
                ARMS[name](site, xs[width], ys[outputs], segments)
            samples.append(time.process_time() - start)
    milliseconds = {
        name: round(1e3 * statistics.median(samples[1:]), 2) for name, samples in seconds.items()
    }
    return {
        "batch": batch,
        "adapters": slots,
        "median_cpu_ms": milliseconds,
        "adapters_over_base": {
            name: round(value / milliseconds["base"], 3)
            for name, value in milliseconds.items()
            if name != "base"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        cases = [measure(rows, 16, arguments.repeats) for rows in (1, 4, 16)]
    report = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "ranks": RANKS,
        "cases": cases,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
