"""The products x A^T of a step on a CPU, on their way from shrink to expand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class NativeProducts:
    """All in one tensor [T, R], as the C form leaves them."""

    values: torch.Tensor
    a: PackedMatrices
    segments: Segments

    def pieces(self) -> list[torch.Tensor | None]:
        """The products of each span, as views [rows, rank]; None where the slot has no matrix."""
        return [
            self.values[start:end, :rank] if (rank := self.a.rows_of(slot)) else None
            for slot, start, end in self.segments.spans
        ]
