"""Times the base's products of few rows on a GPU: cuBLAS's, and a candidate in many shapes.

    python bench/gpu_linear.py --json linear.json

Llama-3.1-8B's products and head, every layer with weights of its own, as CUDA graphs. First each
product of 32 rows by itself, in all shapes of programs that divide it; then the fastest of each at
other numbers of rows; then whole layers, with all but attention between the products. Beside them
the time in which a copy moves as many bytes. On an H100 or H200, without a
network; every result is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu.consumers import consumer
from gpu.plan import Machine
from gpu.report import conditions
from gpu.shapes import LAYERS, LLAMA, SiteShape
from gpu.skinny import Scratch, Shape, skinny_linear
from gpu.timing import Captured, capture, interleaved_medians, machine

ROWS, OTHER_ROWS = 32, (1, 8, 16, 64)
HEAD = SiteShape("head", 4096, (128256,))
PRODUCTS = (*LLAMA, HEAD)
SHAPES = [
    Shape(block_n, block_k, parts, warps, stages, ahead)
    for block_n, block_k, warps, stages in (
        (64, 64, 4, 4),
        (64, 128, 4, 3),
        (64, 128, 4, 4),
        (64, 256, 4, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
    )
    for parts in (1, 2, 4, 8)
    for ahead in (0, 512)
]
SECONDS = 0.3

# x, weight, y
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("linear.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    result: dict[str, Any] = {"conditions": conditions({})}
    with torch.inference_mode():
        for key, found in measure():
            result[key] = found
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
            print(key, json.dumps(found), flush=True)


def measure() -> Iterator[tuple[str, Any]]:
    """Named results, one after another."""
    speed, weights = machine(), {site: list(_weights(site)) for site in PRODUCTS}
    yield "machine", vars(speed)
    bench = Bench(weights, speed)
    yield "errors", bench.errors()
    for site in PRODUCTS:
        yield f"{site.name}, {ROWS} rows", bench.shapes(site)
    for rows in OTHER_ROWS:
        yield f"{rows} rows", bench.rows(rows)
    for rows in (ROWS, *OTHER_ROWS):
        yield f"layers of {rows} rows", bench.layers(rows)


def _weights(site: SiteShape) -> Iterator[torch.Tensor]:
    for _ in range(4 if site is HEAD else LAYERS):
        weight = torch.empty(sum(site.outputs), site.width, dtype=torch.bfloat16, device="cuda")
        yield weight.normal_(std=site.width**-0.5)


class Bench:
    """Remembers the fastest shape of each product."""

    def __init__(self, weights: dict[SiteShape, list[torch.Tensor]], speed: Machine) -> None:
        self._weights, self._speed = weights, speed
        self._scratch = Scratch(weights[HEAD][0], sum(HEAD.outputs))
        self._best: dict[SiteShape, Shape] = {}

    def errors(self) -> dict[str, Any]:
        """Against float64, in roundings of what was summed, and whether a row alone is the same."""
        weight, found = self._weights[LLAMA[1]][0], {}
        for shape in (shape for shape in SHAPES if shape.fits(weight)):
            x = torch.randn(37, weight.shape[1], device="cuda").to(weight)
            y, alone = x.new_full((37, len(weight)), math.nan), x.new_empty(1, len(weight))
            self._skinny(shape)(x, weight, y)
            self._skinny(shape)(x[-1:], weight, alone)
            exact = x.double() @ weight.double().t()
            summed = x.double().abs() @ weight.double().abs().t()
            ulps = ((y - exact).abs() / summed).max().item() / torch.finfo(x.dtype).eps
            found[str(shape)] = {"ulps": round(ulps, 3), "alone": torch.equal(alone[0], y[-1])}
        return found

    def shapes(self, site: SiteShape) -> dict[str, Any]:
        """Of all shapes that divide the product; keeps the fastest."""
        fitting = [shape for shape in SHAPES if shape.fits(self._weights[site][0])]
        products = {str(shape): self._skinny(shape) for shape in fitting}
        found = self._time(site, ROWS, {"cuBLAS": _cublas, **products})
        known = {shape: found[str(shape)] for shape in fitting if str(shape) in found}
        self._best[site] = min(known, key=known.__getitem__)
        return found | {"best": str(self._best[site])}

    def rows(self, rows: int) -> dict[str, Any]:
        return {
            site.name: self._time(
                site, rows, {"cuBLAS": _cublas, "skinny": self._skinny(self._best[site])}
            )
            for site in PRODUCTS
        }

    def layers(self, rows: int) -> dict[str, float]:
        """All products of all layers, with what stands between them."""
        like = self._weights[HEAD][0]
        behind = {site: consumer(site, rows, like) for site in LLAMA}
        inputs = {site: self._input(site, rows) for site in LLAMA}

        def layers(products: dict[SiteShape, Product]) -> Captured:
            def run() -> None:
                for layer, site in itertools.product(range(LAYERS), LLAMA):
                    x, y = inputs[site]
                    products[site](x, self._weights[site][layer], y)
                    behind[site].plain(y)

            return capture(run)

        arms = {
            "cuBLAS": layers(dict.fromkeys(LLAMA, _cublas)),
            "skinny": layers({site: self._skinny(self._best[site]) for site in LLAMA}),
        }
        medians = interleaved_medians(list(arms.values()), SECONDS)
        return dict(zip(arms, medians, strict=True)) | {"floor": self._floor(LLAMA, LAYERS)}

    def _time(self, site: SiteShape, rows: int, products: dict[str, Product]) -> dict[str, Any]:
        """Milliseconds of all layers."""
        weights, (x, y) = self._weights[site], self._input(site, rows)
        graphs: dict[str, Captured] = {}
        failed: dict[str, str] = {}
        for name, product in products.items():

            def run(product: Product = product) -> None:
                for weight in weights:
                    product(x, weight, y)

            try:
                graphs[name] = capture(run)
            except Exception as error:  # one shape less, and the reason in the report
                failed[name] = f"{type(error).__name__}: {error}"[:200]
        medians = interleaved_medians(list(graphs.values()), SECONDS)
        found: dict[str, Any] = dict(zip(graphs, medians, strict=True))
        found["floor"] = self._floor([site], len(weights))
        return found | ({"failed": failed} if failed else {})

    def _input(self, site: SiteShape, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        like = self._weights[site][0]
        x = torch.randn(rows, site.width, device=like.device).to(like)
        return x, x.new_empty(rows, len(like))

    def _floor(self, sites: Sequence[SiteShape], layers: int) -> float:
        moved = sum(self._weights[site][0].nbytes for site in sites) * layers
        return 1e3 * moved / self._speed.bytes_per_second

    def _skinny(self, shape: Shape) -> Product:
        return lambda x, weight, y: skinny_linear(x, weight, y, shape, self._scratch)


def _cublas(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
    torch.mm(x, weight.t(), out=y)


if __name__ == "__main__":
    main()
