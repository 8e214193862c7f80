"""x times A transposed, each row with the matrix of its own slot."""

from __future__ import annotations

from typing import TypeAlias

import torch

from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments

# What `shrink` hands to `expand`, opaque in between: from the torch form one [rows, rank] per span
# (None where the slot has no matrix).
Shrunk: TypeAlias = "list[torch.Tensor | None] | torch.Tensor"


def shrink(x: torch.Tensor, a: PackedMatrices, segments: Segments) -> Shrunk:
    """h[t, j] = sum_k x[t, k] A_s[j, k], where s is the slot of row t and j < rows of A_s.

    x [T, K]; A_s [rows of slot s, K].
    """
    return shrink_torch(x, a, segments)


def shrink_torch(
    x: torch.Tensor, a: PackedMatrices, segments: Segments
) -> list[torch.Tensor | None]:
    """`shrink` in plain torch; half types are multiplied and kept in float32."""
    matrices = [a.transposed[slot] for slot, _, _ in segments.spans]
    pieces = segments.pieces(x)
    if x.dtype in (torch.float16, torch.bfloat16):
        return [
            None if matrix is None else torch.mm(rows.float(), matrix.float())
            for rows, matrix in zip(pieces, matrices, strict=True)
        ]
    return [
        None if matrix is None else torch.mm(rows, matrix)
        for rows, matrix in zip(pieces, matrices, strict=True)
    ]
