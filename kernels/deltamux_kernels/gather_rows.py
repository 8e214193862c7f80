"""Where a step's rows find their own matrix rows in one table: the work list of the CPU forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@dataclass(frozen=True)
class GatherRows:
    """For each row t of the spans, in order: which rows of `table`, weighted by which of h.

    y[t] = sum_i h[weights[i]] table[rows[i]], with i from bags[t] to bags[t + 1]; h is the shrunk
    product, its spans one after the other. int64 throughout.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    bags: torch.Tensor

    @classmethod
    def build(
        cls, b: PackedMatrices, first_columns: Sequence[int], h_widths: list[int], spans: Segments
    ) -> GatherRows:
        """`h_widths`: columns of h in each span; `first_columns`: where b's begin, per slot."""
        rows: list[range] = []
        weights: list[range] = []
        position = 0
        for (slot, start, end), width in zip(spans.spans, h_widths, strict=True):
            matrix, column = b.rows_in_table(slot), first_columns[slot]
            for _ in range(start, end):
                rows.append(matrix)
                weights.append(range(position + column, position + column + len(matrix)))
                position += width
        sizes = [0, *(len(matrix) for matrix in rows[:-1])]
        return cls(_flat(rows), _flat(weights), torch.from_numpy(np.cumsum(sizes)))


def _flat(ranges: list[range]) -> torch.Tensor:
    pieces = [np.arange(r.start, r.stop, dtype=np.int64) for r in ranges]
    return torch.from_numpy(np.concatenate(pieces))
