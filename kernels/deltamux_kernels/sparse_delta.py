"""y plus x times a sparse S transposed, each row with the matrix of its own slot."""

from __future__ import annotations

import warnings
from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

BLOCK_N = 64

with warnings.catch_warnings():
    # Once a process torch says that this layout is in beta; what is used of it is tested here.
    warnings.simplefilter("ignore")
    _ = torch.zeros(1, 1).to_sparse_csr()


class SparseMatrices:
    """One sparse matrix [out, in] per slot, by rows, for one site; a slot may have none.

    Row n of S_s holds `values[starts[n] : starts[n + 1]]` at `columns[starts[n] : ...]`. All three
    lie in the arena, the int32 ones as `as_elements`: 4 bytes and one element for each non-zero,
    and 4 bytes for each row.
    """

    def __init__(
        self, arena: torch.Tensor, slots: int, out_features: int, in_features: int
    ) -> None:
        self.values = PackedMatrices(arena, slots, 1)
        self.columns = PackedMatrices(arena, slots, 1)
        self.starts = PackedMatrices(arena, slots, 1)
        self.shape = (out_features, in_features)
        self._by_row: dict[int, torch.Tensor] = {}

    def placed(self, slot: int) -> None:
        """To be called when the three parts of a slot have been written."""
        values, columns, starts = (part.views[slot] for part in self._parts)
        if values is None or columns is None or starts is None or values.device.type == "cuda":
            return
        self._by_row[slot] = torch.sparse_csr_tensor(
            starts.flatten().view(torch.int32),
            columns.flatten().view(torch.int32),
            values.flatten(),
            self.shape,
            check_invariants=False,
        )

    def by_row(self, slot: int) -> torch.Tensor:
        """The slot's matrix for the torch form, a view of the arena. It has one."""
        return self._by_row[slot]

    @property
    def _parts(self) -> tuple[PackedMatrices, PackedMatrices, PackedMatrices]:
        return self.values, self.columns, self.starts


def sparse_delta(y: torch.Tensor, x: torch.Tensor, s: SparseMatrices, segments: Segments) -> None:
    """y[t, n] += sum_k x[t, k] S_s[n, k] over the non-zeros, in place, s = slot of row t.

    y [T, N]; x [T, K]; S_s [N, K]. Rows whose slot has no matrix keep their bits.
    """
    if y.device.type == "cuda":
        sparse_delta_triton(y, x, s, segments)
    else:
        sparse_delta_torch(y, x, s, segments)


def sparse_delta_torch(
    y: torch.Tensor, x: torch.Tensor, s: SparseMatrices, segments: Segments
) -> None:
    """`sparse_delta` in plain torch; half types are computed in float32 and rounded once."""
    wide = y.dtype in (torch.float16, torch.bfloat16)
    for slot, span, _ in segments.owners(s.values):
        given, rows = x[span], y[span]
        matrix = s.by_row(slot)
        if wide:
            rows.copy_(rows.float() + (matrix.float() @ given.float().t()).t())
        else:
            rows.add_((matrix @ given.t()).t())


def sparse_delta_triton(
    y: torch.Tensor, x: torch.Tensor, s: SparseMatrices, segments: Segments
) -> None:
    """`sparse_delta` in one launch: a program per (tile of rows, block of N)."""
    if not segments.most_rows(s.values):
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    width = s.shape[0]
    _sparse_delta_kernel[(segments.tiles.shape[0], -(-width // BLOCK_N))](
        y,
        x,
        s.values.arena,
        s.values.offsets,
        s.columns.offsets,
        s.starts.offsets,
        s.values.rows,
        segments.tiles,
        width,
        y.stride(0),
        y.stride(1),
        x.stride(0),
        BLOCK_T=TILE_ROWS,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
@no_type_check
def _sparse_delta_kernel(
    y,
    x,
    arena,
    value_offsets,
    column_offsets,
    start_offsets,
    non_zeros,
    tiles,
    width,
    y_row,
    y_column,
    x_row,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    if tl.load(non_zeros + slot) == 0:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    live_i, live_n = i < count, n < width
    t = (start + i).to(tl.int64)
    values = arena + tl.load(value_offsets + slot)
    columns = (arena + tl.load(column_offsets + slot)).to(tl.pointer_type(tl.int32))
    starts = (arena + tl.load(start_offsets + slot)).to(tl.pointer_type(tl.int32))
    first = tl.load(starts + n, mask=live_n, other=0)
    last = tl.load(starts + n + 1, mask=live_n, other=0)
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    # Each output sums its own non-zeros in their order; shorter rows of the block idle.
    for step in range(0, tl.max(last - first, axis=0)):
        live = first + step < last
        value = tl.load(values + first + step, mask=live, other=0.0).to(tl.float32)
        column = tl.load(columns + first + step, mask=live, other=0)
        picked = tl.load(
            x + t[:, None] * x_row + column[None, :],
            mask=live_i[:, None] & live[None, :],
            other=0.0,
        )
        total += picked.to(tl.float32) * value[None, :]
    target = y + t[:, None] * y_row + n[None, :] * y_column
    live_y = live_i[:, None] & live_n[None, :]
    before = tl.load(target, mask=live_y, other=0.0).to(tl.float32)
    tl.store(target, (before + total).to(y.dtype.element_ty), mask=live_y)
