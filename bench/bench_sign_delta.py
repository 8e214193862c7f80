"""Times one-bit deltas on the CPU against other ways to do the same.

python bench/bench_sign_delta.py --json out.json
"""

from __future__ import annotations

import torch
from cpu.dense import DenseSite
from cpu.harness import bench_sites
from cpu.packing import Packer

from deltamux_kernels import Segments, SignMatrices, sign_delta
from deltamux_kernels.sign_delta import pack_signs

SCALE = 0.01


class SignDeltaSite(DenseSite):
    """A bit a weight, slot and layer; the other arms multiply the unpacked matrix."""

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        self.matrices = [SCALE * (torch.randn(slots, n, width) > 0).mul(2).sub(1) for n in outputs]
        packer = Packer(slots * (width * sum(outputs) // 16 + 2**16))
        self.packed = [SignMatrices(packer.arena, slots, n, width) for n in outputs]
        for store, stack in zip(self.packed, self.matrices, strict=True):
            for slot, matrix in enumerate(stack):
                words, scale = store.elements(pack_signs(matrix > 0), torch.tensor([SCALE]))
                packer.write(store.words, slot, words)
                packer.write(store.scales, slot, scale)

    def deltamux(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        for y, store in zip(ys, self.packed, strict=True):
            sign_delta(y, x, store, segments)


if __name__ == "__main__":
    bench_sites(SignDeltaSite, __doc__, layers=2)
