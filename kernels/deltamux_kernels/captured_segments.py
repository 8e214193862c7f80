"""The work list of a captured graph: the same memory in every replay, refilled in between."""

from __future__ import annotations

import torch

from deltamux_kernels.captured_table import CapturedTable, most_tiles
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments


class CapturedSegments(Segments):
    """Segments to capture a graph with, so that its replays serve any adapters.

    On the host the slot after the last stands for all of them. Every launch captured has programs
    for `capacity` tiles and for the `reach` of its matrices; `fill` says which tiles a replay has.
    The others name the slot after the last, which has no matrix, and their programs return at once.
    There are no spans: what would read them is wrong in a replay, and fails here.
    """

    def __init__(self, capacity: int, slots: int, device: torch.device) -> None:
        self._table = CapturedTable(capacity, (slots, 0, 0), device)
        # What a step works out, a graph knows from the start.
        vars(self).update(device=device, tiles=self._table.tensor, slots=frozenset({slots}))
        _ = self.counters

    @staticmethod
    def capacity_for(rows: int, slots: int) -> int:
        """The most tiles that `rows` rows can have, each slot's side by side.

        Where others lie between them there may be more.
        """
        return most_tiles(rows, slots, TILE_ROWS)

    def __bool__(self) -> bool:
        return True

    def fill(self, step: Segments) -> bool:
        """Puts a step's tiles in place for the next replay; False if they are too many."""
        return self._table.fill(step.tile_list)

    def most_rows(self, matrices: PackedMatrices) -> int:
        """Rows of the tallest matrix that a replay may meet."""
        return matrices.reach

    def owners(self, matrices: PackedMatrices) -> list[tuple[int, slice, torch.Tensor]]:
        """Nobody: a step that meets matrices that the host reads is not replayed."""
        assert matrices.host_read
        return []
