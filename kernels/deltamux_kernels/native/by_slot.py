"""What the C code is told of the matrices that it finds by slot, and of the rows that meet them."""

from __future__ import annotations

from deltamux_kernels.native.library import INTEGER, POINTER
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments

# Arena, offsets, ranks, width; spans, how many.
BY_SLOT = (POINTER, POINTER, POINTER, INTEGER, POINTER, INTEGER)


def by_slot(matrices: PackedMatrices, segments: Segments) -> tuple[int, ...]:
    """The last arguments of each such function, of the types in `BY_SLOT`."""
    return (
        matrices.arena.data_ptr(),
        matrices.offsets.data_ptr(),
        matrices.rows.data_ptr(),
        matrices.width,
        segments.table.data_ptr(),
        len(segments.table),
    )
