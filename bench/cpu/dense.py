"""Adapters that are, or stand for, a whole matrix: the ways that multiply it out."""

from __future__ import annotations

import torch

from cpu.harness import Site
from deltamux_kernels import Segments


class DenseSite(Site):
    """Every adapter's matrix [N, K] of each layer, multiplied by itself or in one batch."""

    arms = ("deltamux", "loop_over_adapters", "dense_bmm")
    single_row_arms = ("dense_bmm",)
    matrices: list[torch.Tensor]  # per layer [slots, N, K]

    def loop_over_adapters(
        self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments
    ) -> None:
        for y, matrices in zip(ys, self.matrices, strict=True):
            for slot, start, end in segments.spans:
                y[start:end].addmm_(x[start:end], matrices[slot].t())

    def dense_bmm(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        """One row each, so no gather is needed."""
        for y, matrices in zip(ys, self.matrices, strict=True):
            y += torch.bmm(matrices, x[:, :, None])[:, :, 0]
