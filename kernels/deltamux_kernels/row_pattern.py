"""Which rows of a table each row of a step is multiplied with: the work list of the CPU forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Rows `start` to `end` of a step have the adapter in this slot: (slot, start, end).
Span = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class RowPattern:
    """The pattern of a sparse matrix [T, rows of the table], in compressed rows; int64 throughout.

    Row t of the spans, counted from the first one's start, has entries `starts[t]` to
    `starts[t + 1]`, in the columns `rows`. A row between spans, or of a slot without a matrix, has
    none.
    """

    spans: tuple[Span, ...]
    starts: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def build(cls, spans: tuple[Span, ...], rows_of_span: Sequence[range]) -> RowPattern:
        """`rows_of_span`: which rows of the table every row of that span uses."""
        used: list[range] = []
        for (_, start, end), rows in zip(spans, rows_of_span, strict=True):
            used += [range(0)] * (start - spans[0][1] - len(used))
            used += [rows] * (end - start)
        sizes = [0, *map(len, used)]
        return cls(spans, torch.from_numpy(np.cumsum(sizes)), _flat(used))

    @property
    def covered(self) -> slice:
        """The rows of the step from the first span to the last."""
        return slice(self.spans[0][1], self.spans[-1][2])

    def matrix(self, table: torch.Tensor) -> torch.Tensor:
        """A sparse matrix of this pattern, its values 0."""
        values = table.new_zeros(self.rows.shape[0])
        size = (self.starts.shape[0] - 1, table.shape[0])
        return torch.sparse_csr_tensor(self.starts, self.rows, values, size, check_invariants=False)

    def entries(self, columns_of_span: Sequence[range]) -> torch.Tensor:
        """Which entries are, in each row of a span, those in `columns` of all that the row has."""
        starts = self.starts.tolist()
        picked = [
            range(starts[row] + columns.start, starts[row] + columns.stop)
            for (_, start, end), columns in zip(self.spans, columns_of_span, strict=True)
            for row in range(start - self.spans[0][1], end - self.spans[0][1])
        ]
        return _flat(picked)


def _flat(ranges: list[range]) -> torch.Tensor:
    pieces = [np.arange(r.start, r.stop, dtype=np.int64) for r in ranges]
    return torch.from_numpy(np.concatenate(pieces))
