"""Rows of integers that a captured graph reads: the same memory in every replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltamux_kernels.staged import Staged

Row = tuple[int, ...]


def most_tiles(rows: int, spans: int, tile: int) -> int:
    """The most tiles of at most `tile` rows that up to `spans` spans cut `rows` rows into."""
    spans = min(rows, spans)
    return spans + (rows - spans) // tile


class CapturedTable:
    """`tensor` int32 [capacity, columns]: the rows filled in last, and `nothing` in all others."""

    def __init__(self, capacity: int, nothing: Row, device: torch.device) -> None:
        self._nothing = nothing
        self._capacity = capacity
        self._filled: Sequence[Row] = []
        initial = torch.tensor([nothing] * capacity, dtype=torch.int32)
        self._staged = Staged(initial, device)
        self.tensor = self._staged.tensor

    def fill(self, rows: Sequence[Row]) -> bool:
        """Puts rows in place for the next replay; False if they are too many.

        On CUDA a copy on the current stream that nobody waits for, and none at all where the rows
        are those of the last time.
        """
        if len(rows) > self._capacity:
            return False
        if rows != self._filled:
            self._write(rows)
            self._filled = rows
        return True

    def _write(self, rows: Sequence[Row]) -> None:
        table = [*rows, *[self._nothing] * (self._capacity - len(rows))]
        self._staged.host().copy_(torch.tensor(table, dtype=torch.int32))
        self._staged.send()
