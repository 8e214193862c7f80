"""Sparse delta: y += x S^T with only the non-zeros of S stored, at a linear site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.packed import PackedMatrices, as_elements
from deltamux_kernels.segments import Segments
from deltamux_kernels.sparse_delta import SparseMatrices, sparse_delta


@dataclass(frozen=True, eq=False)
class SparseDelta(Payload):
    """`values` [non-zeros] by rows, int32 `columns` beside them, int32 `starts` [out + 1]."""

    values: Tensor
    columns: Tensor
    starts: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, values: Tensor, out_features: int) -> SparseDelta:
        """From non-zeros in any order; those of one place add up."""
        order = torch.argsort(rows, stable=True)
        starts = torch.zeros(out_features + 1, dtype=torch.int32)
        starts[1:] = torch.bincount(rows, minlength=out_features).cumsum(0)
        return cls(values[order].contiguous(), columns[order].int(), starts)


class SparseDeltaBank(OutputBank):
    """The sparse matrices of one site."""

    def __init__(self, matrices: SparseMatrices) -> None:
        super().__init__()
        self._matrices = matrices

    def pieces(self, payload: SparseDelta) -> Sequence[tuple[PackedMatrices, Tensor]]:
        dtype = payload.values.dtype
        return (
            (self._matrices.values, payload.values[:, None]),
            (self._matrices.columns, as_elements(payload.columns, dtype)),
            (self._matrices.starts, as_elements(payload.starts, dtype)),
        )

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        self._matrices.placed(slot)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        sparse_delta(y, x.flatten(0, -2), self._matrices, segments)
