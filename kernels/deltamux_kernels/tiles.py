"""How a kernel reads the tile of rows that its program computes."""

from __future__ import annotations

from typing import no_type_check

from deltamux_kernels._triton import tl, triton


@triton.jit
@no_type_check
def load_tile(tiles, tile):
    """Slot, first row and number of rows of a tile of `Segments`."""
    return tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
