"""Matrices of unequal row counts, one per slot, packed exactly in a shared arena."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

# Elements. An offset that is a multiple of it lets the kernels load 16 bytes at a time in every
# dtype, and starts each matrix on a cache line of its own.
ALIGNMENT = 64


def as_elements(integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of int32 numbers as an arena of `dtype` holds them: [elements, 1]."""
    return integers.flatten().contiguous().view(dtype)[:, None]


class PackedMatrices:
    """One row-major matrix [rows, width] per slot, for one site; a slot may have none.

    All sites share one flat `arena`; a matrix takes `rows * width` of its elements, from a multiple
    of `ALIGNMENT` on, and no padding. `offsets` (int64, elements) and `rows` (int32, 0 = none),
    both [slots + 1], live on the arena's device for the Triton and C forms; `views` holds the same
    matrices for the torch forms. The slot after the last never has a matrix: tiles that name it end
    their programs at once.

    In an arena of float32, a store that `halves` keeps a matrix of bfloat16 in half as many
    elements, and its offset is one more.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        slots: int,
        width: int,
        host_read: bool = False,
        halves: bool = False,
    ) -> None:
        """`host_read`: no kernel finds these matrices by slot, the host does in every step, so that
        no captured step stands for one that meets them. `halves`: only C code finds them.
        """
        self.arena = arena
        self.width = width
        self.host_read = host_read
        self.halves = halves
        # Rows of the tallest matrix that launches of `CapturedSegments` have programs for.
        self.reach = 0
        self.offsets = torch.zeros(slots + 1, dtype=torch.int64, device=arena.device)
        self.rows = torch.zeros(slots + 1, dtype=torch.int32, device=arena.device)
        self.views: list[torch.Tensor | None] = [None] * slots
        self.transposed: list[torch.Tensor | None] = [None] * slots
        self._rows_on_host = [0] * slots

    def elements(self, matrices: Sequence[torch.Tensor]) -> int:
        """Of the arena, that these take as one, concatenated."""
        numbers = sum(matrix.numel() for matrix in matrices)
        return -(-numbers // 2) if self._in_half(matrices) else numbers

    def _in_half(self, matrices: Iterable[torch.Tensor]) -> bool:
        return self.halves and all(matrix.dtype == torch.bfloat16 for matrix in matrices)

    def write(self, slot: int, offset: int, matrix: torch.Tensor) -> None:
        """Copy `matrix` [rows, width] to `arena[offset:]` and make it the slot's own.

        On CUDA the copy runs on the current stream, and is over when this returns: where the matrix
        lies on the host, nobody else keeps it. Raises ValueError for a wrong width, an offset off
        `ALIGNMENT`, or a matrix that does not fit the arena.
        """
        rows, width = matrix.shape
        end, half = offset + self.elements([matrix]), self._in_half([matrix])
        if width != self.width:
            raise ValueError(f"matrix is {width} wide, this site is {self.width}")
        if offset % ALIGNMENT or offset < 0 or end > self.arena.numel():
            raise ValueError(f"[{offset}, {end}) is no aligned extent of {self.arena.numel()}")
        place = self.arena[offset:end]
        if half:
            place = place.view(torch.bfloat16)[: matrix.numel()]
        own = place.view(rows, width).copy_(matrix)
        self.offsets[slot].fill_(offset + half)
        self.rows[slot].fill_(rows)
        self._point(slot, own)

    def _point(self, slot: int, view: torch.Tensor) -> None:
        rows = view.shape[0]
        self._rows_on_host[slot] = rows
        self.views[slot] = view if rows else None
        self.transposed[slot] = view.t() if rows else None

    def clear(self, slot: int) -> None:
        """Forget the slot's matrix, on the host and in the table.

        Steps of other slots may be under way: nothing waits for the device, as an assignment to one
        number of a tensor would.
        """
        self.forget(slot)
        self.rows[slot].zero_()

    def forget(self, slot: int) -> None:
        """Its extent belongs to the caller again. Kernels find the matrix by slot until `clear` or
        the next `write`: no row of a step may have the slot before.
        """
        self._rows_on_host[slot] = 0
        self.views[slot] = None
        self.transposed[slot] = None

    def extend(self, rows: int) -> bool:
        """Makes launches of `CapturedSegments` reach matrices of so many rows; True if those that
        were captured before do not. In powers of two, so that it is seldom.
        """
        if rows <= self.reach:
            return False
        self.reach = max(16, 1 << (rows - 1).bit_length())
        return True

    def rows_of(self, slot: int) -> int:
        """Rows of the slot's matrix; 0 when it has none."""
        return self._rows_on_host[slot]

    def most_rows(self, slots: Iterable[int]) -> int:
        """Rows of the tallest matrix among `slots`; 0 when none has one."""
        return max((self._rows_on_host[slot] for slot in slots), default=0)


class DividedMatrices(PackedMatrices):
    """Matrices of which `parts` has equal parts, as of slots of their own: slot * count + part.

    Every part must hold a multiple of ALIGNMENT elements.
    """

    def __init__(self, arena: torch.Tensor, slots: int, width: int, count: int) -> None:
        super().__init__(arena, slots, width)
        self.parts = PackedMatrices(arena, slots * count, width)
        self._count = count

    def write(self, slot: int, offset: int, matrix: torch.Tensor) -> None:
        super().write(slot, offset, matrix)
        own, rows = self._own(slot), matrix.shape[0] // self._count
        offsets = [offset + part * rows * self.width for part in range(self._count)]
        self.parts.offsets[own] = torch.tensor(offsets)
        self._divide(own, offsets, rows)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.parts.rows[self._own(slot)].zero_()

    def forget(self, slot: int) -> None:
        super().forget(slot)
        own = self._own(slot)
        for part in range(own.start, own.stop):
            self.parts.forget(part)

    def extend(self, rows: int) -> bool:
        return self.parts.extend(rows // self._count)

    def _own(self, slot: int) -> slice:
        return slice(slot * self._count, (slot + 1) * self._count)

    def _divide(self, own: slice, offsets: list[int], rows: int) -> None:
        self.parts.rows[own].fill_(rows)
        for part, offset in enumerate(offsets, start=own.start):
            matrix = self.arena[offset : offset + rows * self.width].view(rows, self.width)
            self.parts._point(part, matrix)
