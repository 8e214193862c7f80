"""Segments of which only the device knows the tiles."""

from __future__ import annotations

import torch

from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


class DeviceSegments(Segments):
    """Segments of which the host knows no more than how many tiles there are at most.

    A tile that a step does not have names the slot after the last, which has no matrix, and its
    programs return at once. On the host that slot stands for all of them, and every launch has
    programs for the `reach` of its matrices. There are no spans: what would read them fails here.
    """

    def __init__(self, tiles: torch.Tensor, slots: int) -> None:
        """`tiles` int32 [capacity, 3] of (slot, start, rows)."""
        # What a step works out is given from the start.
        vars(self).update(device=tiles.device, tiles=tiles, table=tiles, slots=frozenset({slots}))

    def __bool__(self) -> bool:
        return True

    def most_rows(self, matrices: PackedMatrices) -> int:
        """Rows of the tallest matrix that a row may ever meet."""
        return matrices.reach

    def owners(self, matrices: PackedMatrices) -> list[tuple[int, slice, torch.Tensor]]:
        """Nobody: a step that meets matrices that the host reads is not replayed."""
        assert matrices.host_read
        return []
