"""y plus h times B, each row with the matrix of its own slot."""

from __future__ import annotations

import torch

from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments
from deltamux_kernels.shrink import Shrunk


class Columns:
    """The first column of one slice in h, per slot.

    Layers that read the same input share one shrink, whose A stacks theirs (q, k and v:
    [r_q + r_k + r_v, K]); each of them expands from its own columns.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.first = [0] * slots
        self.table = torch.zeros(slots, dtype=torch.int32, device=device)

    def set(self, slot: int, column: int) -> None:
        self.first[slot] = column
        self.table[slot] = column


def expand(
    y: torch.Tensor, h: Shrunk, b: PackedMatrices, columns: Columns, segments: Segments
) -> None:
    """y[t, n] += sum_j h[t, c_s + j] B_s[j, n], j < rows of B_s, in place, rounded once.

    y [T, N]; B_s [rank, N] with the adapter's scale folded in; c_s = `columns` of slot s = slot of
    row t. Rows in no span keep their bits.
    """
    assert not isinstance(h, torch.Tensor)
    expand_torch(y, h, b, columns, segments)


def expand_torch(
    y: torch.Tensor,
    h: list[torch.Tensor | None],
    b: PackedMatrices,
    columns: Columns,
    segments: Segments,
) -> None:
    """`expand` in plain torch; half types are multiplied and added in float32."""
    wide = y.dtype in (torch.float16, torch.bfloat16)
    for (slot, _, _), rows, products in zip(segments.spans, segments.pieces(y), h, strict=True):
        matrix = b.views[slot]
        if matrix is None or products is None:
            continue
        column, rank = columns.first[slot], b.rows_of(slot)
        if rank != products.shape[1]:
            products = products[:, column : column + rank]
        if wide:
            rows.copy_(rows.float().addmm_(products, matrix.float()))
        else:
            rows.addmm_(products, matrix)
