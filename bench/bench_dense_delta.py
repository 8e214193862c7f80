"""Times dense deltas (modules_to_save, full tunes) on the CPU against other ways to do the same.

python bench/bench_dense_delta.py --json out.json
"""

from __future__ import annotations

import torch
from cpu.dense import DenseSite
from cpu.harness import bench_sites
from cpu.packing import Packer

from deltamux_kernels import Segments, dense_delta


class DenseDeltaSite(DenseSite):
    """A whole matrix a slot and layer, in the arena and in a stack."""

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        self.matrices = [torch.randn(slots, n, width) for n in outputs]
        packer = Packer(slots * (width * sum(outputs) + 2**16))
        self.packed = [packer.stored(list(stack)) for stack in self.matrices]

    def deltamux(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        for y, weights in zip(ys, self.packed, strict=True):
            dense_delta(y, x, weights, segments)


if __name__ == "__main__":
    bench_sites(DenseDeltaSite, __doc__, layers=2)
