"""Times a scale per output feature on the CPU (IA3, DoRA) against other ways to do the same.

python bench/bench_row_affine.py --json out.json
"""

from __future__ import annotations

import torch
from cpu.harness import Site, bench_sites
from cpu.packing import Packer

from deltamux_kernels import Segments, row_affine


class RowAffineSite(Site):
    """One scale a slot for each layer of the site."""

    arms = ("deltamux", "loop_over_adapters", "gathered")
    single_row_arms = ("gathered",)

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        self.scales = [1 + 0.01 * torch.randn(slots, n) for n in outputs]
        packer = Packer(slots * sum(outputs) + 2**16 * slots)
        self.packed = [packer.stored(list(scale[:, None])) for scale in self.scales]

    def deltamux(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        for y, scale in zip(ys, self.packed, strict=True):
            row_affine(y, None, scale, segments)

    def loop_over_adapters(
        self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments
    ) -> None:
        for y, scale in zip(ys, self.scales, strict=True):
            for slot, start, end in segments.spans:
                y[start:end] *= scale[slot]

    def gathered(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        """One product with the scales of all rows; here row t is slot t's."""
        for y, scale in zip(ys, self.scales, strict=True):
            y *= scale


if __name__ == "__main__":
    bench_sites(RowAffineSite, __doc__)
