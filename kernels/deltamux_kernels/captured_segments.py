"""The work list of a captured graph: the same memory in every replay, refilled in between."""

from __future__ import annotations

import torch

from deltamux_kernels.captured_table import CapturedTable, most_tiles
from deltamux_kernels.device_segments import DeviceSegments
from deltamux_kernels.segments import TILE_ROWS, Segments


class CapturedSegments(DeviceSegments):
    """Segments to capture a graph with, so that its replays serve any adapters.

    Every launch captured has programs for `capacity` tiles and for the `reach` of its matrices;
    `fill` says which tiles a replay has.
    """

    def __init__(self, capacity: int, slots: int, device: torch.device) -> None:
        self._table = CapturedTable(capacity, (slots, 0, 0), device)
        super().__init__(self._table.tensor, slots)
        _ = self.counters

    @staticmethod
    def capacity_for(rows: int, slots: int) -> int:
        """The most tiles that `rows` rows can have, each slot's side by side.

        Where others lie between them there may be more.
        """
        return most_tiles(rows, slots, TILE_ROWS)

    def fill(self, step: Segments) -> bool:
        """Puts a step's tiles in place for the next replay; False if they are too many."""
        return self._table.fill(step.tile_list)
