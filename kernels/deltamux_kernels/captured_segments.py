"""The work list of a captured graph: the same memory in every replay, refilled in between."""

from __future__ import annotations

import torch

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
        self._no_tile = (slots, 0, 0)
        self._filled: list[tuple[int, int, int]] | None = None
        self._host = torch.tensor([self._no_tile] * capacity, dtype=torch.int32)
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._host = self._host.pin_memory()
            self._copied = torch.cuda.Event()
        # What a step works out, a graph knows from the start.
        tiles = self._host.to(device, copy=True)
        vars(self).update(device=device, tiles=tiles, slots=frozenset({slots}))

    @staticmethod
    def capacity_for(rows: int, slots: int) -> int:
        """The most tiles that `rows` rows can have, each slot's side by side."""
        spans = min(rows, slots)
        return spans + (rows - spans) // TILE_ROWS

    def __bool__(self) -> bool:
        return True

    def fill(self, step: Segments) -> bool:
        """Puts a step's tiles in place for the next replay; False if they are too many.

        On CUDA a copy on the current stream that nobody waits for, and none at all where the tiles
        are those of the last step.
        """
        tiles = step.tile_list
        if len(tiles) > len(self._host):
            return False
        if tiles != self._filled:
            self._write(tiles)
            self._filled = tiles
        return True

    def _write(self, tiles: list[tuple[int, int, int]]) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # the last copy has read its source, a step ago as a rule
        table = tiles + [self._no_tile] * (len(self._host) - len(tiles))
        self._host.copy_(torch.tensor(table, dtype=torch.int32))
        self.tiles.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def most_rows(self, matrices: PackedMatrices) -> int:
        """Rows of the tallest matrix that a replay may meet."""
        return matrices.reach

    def owners(self, matrices: PackedMatrices) -> list[tuple[int, slice, torch.Tensor]]:
        """Nobody: a step that meets matrices that the host reads is not replayed."""
        assert matrices.host_read
        return []
