"""Times a rotation of output features in pairs (RoAd) on the CPU against other ways.

python bench/bench_pair_rotate.py --json out.json
"""

from __future__ import annotations

import torch
from cpu.harness import Site, bench_sites
from cpu.packing import Packer

from deltamux_kernels import Segments, pair_rotate
from deltamux_kernels.pair_rotate import PairFactors, distance_elements

DISTANCE = 32


class PairRotateSite(Site):
    """Two factors a feature, slot and layer; partners are 32 features apart."""

    arms = ("deltamux", "loop_over_adapters", "gathered")
    single_row_arms = ("gathered",)

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        angles = [torch.randn(slots, n) for n in outputs]
        self.factors = [torch.stack((angle.cos(), angle.sin()), 1) for angle in angles]
        packer = Packer(slots * (2 * sum(outputs) + 2**16))
        self.packed = [PairFactors(packer.arena, slots, n) for n in outputs]
        for store, factors in zip(self.packed, self.factors, strict=True):
            for slot, own in enumerate(factors):
                packer.write(store.factors, slot, own)
                packer.write(store.distances, slot, distance_elements(DISTANCE, torch.float32))
                store.placed(slot)

    def deltamux(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        for y, factors in zip(ys, self.packed, strict=True):
            pair_rotate(y, factors, segments)

    def loop_over_adapters(
        self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments
    ) -> None:
        for y, factors in zip(ys, self.factors, strict=True):
            for slot, start, end in segments.spans:
                rows, (own, other) = y[start:end], factors[slot]
                y[start:end] = rows * own + _partners(rows) * other

    def gathered(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        """The factors of all rows at once; here row t is slot t's."""
        for y, factors in zip(ys, self.factors, strict=True):
            y.copy_(y * factors[:, 0] + _partners(y) * factors[:, 1])


def _partners(y: torch.Tensor) -> torch.Tensor:
    return y.unflatten(1, (-1, 2, DISTANCE)).flip(2).flatten(1)


if __name__ == "__main__":
    bench_sites(PairRotateSite, __doc__)
