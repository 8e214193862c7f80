"""Times a block-diagonal transform of the input (OFT, BOFT) on the CPU against other ways.

python bench/bench_block_rotate.py --json out.json
"""

from __future__ import annotations

import torch
from cpu.harness import Site, bench_sites
from cpu.packing import Packer

from deltamux_kernels import Segments, block_rotate

BLOCK = 32


class BlockRotateSite(Site):
    """Blocks of 32 a slot; what comes out is the input of every layer of the site."""

    arms = ("deltamux", "loop_over_adapters", "bmm")
    single_row_arms = ("bmm",)

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        # [slots, blocks, BLOCK, BLOCK]
        self.blocks = torch.randn(slots, width // BLOCK, BLOCK, BLOCK)
        side_by_side = self.blocks.transpose(1, 2).reshape(slots, BLOCK, width)
        packer = Packer(slots * (BLOCK * width + 2**16))
        self.packed = packer.stored(list(side_by_side))
        self.rotated = torch.empty(0)

    def deltamux(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        self.rotated = torch.empty_like(x)
        block_rotate(self.rotated, x, self.packed, segments)

    def loop_over_adapters(
        self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments
    ) -> None:
        """As PEFT writes it: one einsum an adapter."""
        self.rotated = torch.empty_like(x)
        for slot, start, end in segments.spans:
            rows = x[start:end].unflatten(1, (-1, BLOCK))
            product = torch.einsum("tbk,bkn->tbn", rows, self.blocks[slot])
            self.rotated[start:end] = product.flatten(1)

    def bmm(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        """One row each: a batch of all blocks of all rows."""
        rows = x.view(-1, 1, BLOCK)
        self.rotated = torch.bmm(rows, self.blocks.view(-1, BLOCK, BLOCK)).view(x.shape)


if __name__ == "__main__":
    bench_sites(BlockRotateSite, __doc__)
