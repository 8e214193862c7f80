"""Times the base's linear layers on the CPU in our layout, in oneDNN's, and as they come.

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
    """The products of all layers, in the order in which they run; about 1.2 GB."""
    in_a_layer = [(width, n) for width, outputs in SITES for n in outputs]
    linears = [nn.Linear(*shape, bias=False) for shape in [*in_a_layer * LAYERS, HEAD]]
    panels, one_dnn = ([own(linear.weight) for linear in linears] for own in (Panels, OneDnn))
    for packed in (*panels, *one_dnn):
        collapse(*packed.memory)
    return {
        "deltamux": [packed.product for packed in panels],
        "onednn": [packed.product for packed in one_dnn],
        "plain": list(linears),
    }


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
    print("  rows", *(f"{name:>10}" for name in names), " deltamux / onednn")
    for rows, of_arm in found.items():
        ratio = of_arm["deltamux"] / of_arm["onednn"]
        print(f"{rows:6}", *(f"{of_arm[name]:7.2f} ms" for name in names), f"{ratio:15.2f}")


if __name__ == "__main__":
    main()
