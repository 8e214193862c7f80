"""Which rows of one step belong to which adapter slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch

from deltamux_kernels.device_table import device_table
from deltamux_kernels.packed import PackedMatrices

# Rows `start` to `end` of a step have the adapter in this slot: (slot, start, end).
Span: TypeAlias = tuple[int, int, int]

# Rows of one matrix instruction. The tile never depends on the batch, so neither does the
# instruction that computes a row, and a row's result is the same beside any neighbours.
TILE_ROWS = 16
# Blocks of 16 columns that programs of one tile can wait for each other at.
COUNTERS_A_TILE = 64


@dataclass(frozen=True)
class Segments:
    """Spans of rows `(slot, start, end)`, sorted by start and disjoint; other rows have no adapter.

    `spans` serves the torch forms, and as a `table` those in C. The Triton forms read `tiles`, the
    same rows cut into tiles of at most `TILE_ROWS`, so that no program exists for a slot that has
    no row in the step.
    """

    spans: tuple[Span, ...]
    device: torch.device

    @classmethod
    def build(cls, spans: Sequence[Span], device: torch.device) -> Segments:
        """Segments of `spans`; neighbours of one slot become one span, empty spans disappear.

        The last ones are remembered: a decode step with the members of the step before it builds
        and copies nothing. Raises ValueError when spans overlap or are not sorted by start.
        """
        return _build(tuple(spans), device)

    def __bool__(self) -> bool:
        return bool(self.spans)

    @cached_property
    def slots(self) -> frozenset[int]:
        """The slots that have at least one row."""
        return frozenset(slot for slot, _, _ in self.spans)

    @cached_property
    def table(self) -> torch.Tensor:
        """`(slot, start, rows)` of every span: int32 [spans, 3]."""
        rows = [(slot, start, end - start) for slot, start, end in self.spans]
        return device_table(rows, columns=3, device=self.device)

    @cached_property
    def tiles(self) -> torch.Tensor:
        """`tile_list` on the device: int32 [tiles, 3]."""
        return device_table(self.tile_list, columns=3, device=self.device)

    @cached_property
    def counters(self) -> torch.Tensor:
        """int32 [tiles * COUNTERS_A_TILE], zero before and after every launch that counts in it."""
        return torch.zeros(
            self.tiles.shape[0] * COUNTERS_A_TILE, dtype=torch.int32, device=self.device
        )

    @cached_property
    def tile_list(self) -> list[tuple[int, int, int]]:
        """`(slot, start, rows)` of every tile of at most `TILE_ROWS` rows."""
        return [
            (slot, row, min(TILE_ROWS, end - row))
            for slot, start, end in self.spans
            for row in range(start, end, TILE_ROWS)
        ]

    def most_rows(self, matrices: PackedMatrices) -> int:
        """Rows of the tallest matrix that a row of the step may meet; 0 when there is none."""
        return matrices.most_rows(self.slots)

    def owners(self, matrices: PackedMatrices) -> list[tuple[int, slice, torch.Tensor]]:
        """The slots of the step that have a matrix there, each with its rows and the matrix.

        In a mix of families few have, and no view is made for the others.
        """
        return [
            (slot, slice(start, end), matrix)
            for slot, start, end in self.spans
            if (matrix := matrices.views[slot]) is not None
        ]

    def pieces(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each span, as views of `x` [T, ...].

        One split of the whole tensor: a view made so costs half of one made by slicing.
        """
        parts = x.split_with_sizes(self._sizes(x.shape[0]))
        return [parts[index] for index in self._part_of_span]

    def _sizes(self, rows: int) -> list[int]:
        last = self.spans[-1][2] if self.spans else 0
        return [*self._sizes_to_last_span, rows - last]

    @cached_property
    def _sizes_to_last_span(self) -> list[int]:
        sizes, row = [], 0
        for _, start, end in self.spans:
            if start > row:
                sizes.append(start - row)
            sizes.append(end - start)
            row = end
        return sizes

    @cached_property
    def _part_of_span(self) -> list[int]:
        indices, index, row = [], 0, 0
        for _, start, end in self.spans:
            index += start > row
            indices.append(index)
            index, row = index + 1, end
        return indices


# Token rows and sampled rows of two kinds of step.
@lru_cache(maxsize=4)
def _build(spans: tuple[Span, ...], device: torch.device) -> Segments:
    merged: list[Span] = []
    end_of_previous = 0
    for slot, start, end in spans:
        if slot < 0 or start < end_of_previous or end < start:
            raise ValueError(f"spans must be sorted and disjoint, got {tuple(spans)}")
        if start == end:
            continue
        if merged and merged[-1][0] == slot and merged[-1][2] == start:
            merged[-1] = (slot, merged[-1][1], end)
        else:
            merged.append((slot, start, end))
        end_of_previous = end
    return Segments(tuple(merged), device)
