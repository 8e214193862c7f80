"""Which rows of a table each row of a step is multiplied with: the work list of the CPU forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

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
        used = _by_row(spans, rows_of_span)
        starts = np.zeros(len(used) + 1, dtype=np.int64)
        np.cumsum([len(rows) for rows in used], out=starts[1:])
        return cls(spans, torch.from_numpy(starts), torch.from_numpy(_joined(used)))

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
        columns = _by_row(self.spans, columns_of_span)
        return torch.from_numpy(_joined(columns, self.starts[:-1].numpy()))


def _by_row(spans: tuple[Span, ...], of_span: Sequence[range]) -> list[range]:
    """The range of each row from the first span's start on, empty between spans."""
    rows: list[range] = []
    for (_, start, end), numbers in zip(spans, of_span, strict=True):
        rows += [range(0)] * (start - spans[0][1] - len(rows))
        rows += [numbers] * (end - start)
    return rows


def _joined(ranges: list[range], offsets: Array | int = 0) -> Array:
    """The numbers of all ranges one after the other, each range moved by its offset."""
    sizes = np.array([len(numbers) for numbers in ranges])
    firsts = np.array([numbers.start for numbers in ranges]) + offsets
    ends = sizes.cumsum()
    joined: Array = np.arange(ends[-1]) + np.repeat(firsts - ends + sizes, sizes)
    return joined
