"""Times sparse deltas (SHiRA) of 1 % on the CPU against other ways to do the same.

python bench/bench_sparse_delta.py --json out.json
"""

from __future__ import annotations

import torch
from cpu.dense import DenseSite
from cpu.harness import bench_sites
from cpu.packing import Packer

from deltamux_kernels import Segments, SparseMatrices, sparse_delta
from deltamux_kernels.packed import as_elements

SHARE = 0.01


class SparseDeltaSite(DenseSite):
    """A sparse matrix a slot and layer; the other arms multiply it with its zeros."""

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        self.matrices = [
            torch.randn(slots, n, width) * (torch.rand(slots, n, width) < SHARE) for n in outputs
        ]
        packer = Packer(slots * (int(4 * SHARE * width * sum(outputs)) + 2**16))
        self.packed = [SparseMatrices(packer.arena, slots, n, width) for n in outputs]
        for store, stack in zip(self.packed, self.matrices, strict=True):
            for slot, matrix in enumerate(stack):
                by_row = matrix.to_sparse_csr()
                starts, columns = by_row.crow_indices().int(), by_row.col_indices().int()
                packer.write(store.values, slot, by_row.values()[:, None])
                packer.write(store.columns, slot, as_elements(columns, torch.float32))
                packer.write(store.starts, slot, as_elements(starts, torch.float32))
                store.placed(slot)

    def deltamux(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        for y, store in zip(ys, self.packed, strict=True):
            sparse_delta(y, x, store, segments)


if __name__ == "__main__":
    bench_sites(SparseDeltaSite, __doc__, layers=2)
