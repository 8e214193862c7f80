"""The columns of A that token ids name, each row with the matrix of its own slot."""

from __future__ import annotations

import torch

from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments
from deltamux_kernels.shrink import Shrunk


def embedding_shrink(ids: torch.Tensor, a: PackedMatrices, segments: Segments) -> Shrunk:
    """h[t, j] = A_s[j, ids[t]], where s is the slot of row t and j < rows of A_s.

    ids int32 or int64 [T]; A_s [rank, vocabulary]. It is `shrink` of one-hot rows, and its result
    goes to `expand`.
    """
    return embedding_shrink_torch(ids, a, segments)


def embedding_shrink_torch(
    ids: torch.Tensor, a: PackedMatrices, segments: Segments
) -> list[torch.Tensor | None]:
    """`embedding_shrink` in plain torch; half types come out in float32, as from `shrink`."""
    narrow = a.arena.dtype not in (torch.float16, torch.bfloat16)
    columns: list[torch.Tensor | None] = []
    for (slot, _, _), tokens in zip(segments.spans, segments.pieces(ids), strict=True):
        matrix = a.views[slot]
        if matrix is None:
            columns.append(None)
            continue
        picked = matrix.index_select(1, tokens).t()
        columns.append(picked if narrow else picked.float())
    return columns
