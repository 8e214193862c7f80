"""Times the base's linear layers on the CPU in our layout, in oneDNN's, and as they come.

In our layout twice: with weights of float32, and with these rounded to bfloat16, kept in 16 bits.

python bench/bench_linear.py [--rows 1 4 16 128] [--threads 2] [--json out.json]

All layers of the 125 M model and its head, one after the other, so that weights are read from
memory as they are while serving. Arms take turns; the figure is the median of wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from cpu.harness import SITES
from torch import nn

from deltamux.base.huge_pages import collapse
from deltamux.base.packed_linear import OneDnn
from deltamux_kernels.native.panels import Panels

LAYERS = 12
HEAD = (768, 32000)

Product = Callable[[torch.Tensor], torch.Tensor]


def arms() -> dict[str, list[Product]]:
    """The products of all layers, in the order in which they run; about 1.4 GB."""
    in_a_layer = [(width, n) for width, outputs in SITES for n in outputs]
    linears = [nn.Linear(*shape, bias=False) for shape in [*in_a_layer * LAYERS, HEAD]]
    packed = {
        "deltamux": [Panels(linear.weight) for linear in linears],
        "bfloat16": [Panels(linear.weight.bfloat16().float()) for linear in linears],
        "onednn": [OneDnn(linear.weight) for linear in linears],
    }
    for matrix in chain.from_iterable(packed.values()):
        collapse(*matrix.memory)
    products = {name: [matrix.product for matrix in own] for name, own in packed.items()}
    return {**products, "plain": list(linears)}


def measure(products: dict[str, list[Product]], rows: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of all layers, by arm; the first time does not count."""
    xs = {width: torch.randn(rows, width) for width in (768, 2048)}
    widths = [width for width, outputs in SITES for _ in outputs] * LAYERS + [HEAD[0]]
    samples: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(repeats + 1):
        for name, own in products.items():
            start = time.perf_counter()
            for product, width in zip(own, widths, strict=True):
                product(xs[width])
            samples[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(own[1:]), 2) for name, own in samples.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128, 512])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    products = arms()
    found = {rows: measure(products, rows, given.repeats) for rows in given.rows}
    _report(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def _report(found: dict[int, dict[str, float]]) -> None:
    names: Sequence[str] = list(next(iter(found.values())))
    ratios = " deltamux / onednn  bfloat16 / deltamux"
    print("  rows", *(f"{name:>10}" for name in names), ratios)
    for rows, ms in found.items():
        to_one_dnn, in_16_bits = ms["deltamux"] / ms["onednn"], ms["bfloat16"] / ms["deltamux"]
        times = (f"{ms[name]:7.2f} ms" for name in names)
        print(f"{rows:6}", *times, f"{to_one_dnn:18.2f} {in_16_bits:20.2f}")


if __name__ == "__main__":
    main()
