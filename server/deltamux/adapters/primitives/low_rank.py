"""Low rank: y += (x A^T) B at a linear site; sites that read one input share the product x A^T."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.expand import Columns, expand
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments
from deltamux_kernels.shrink import Shrunk, shrink


@dataclass(frozen=True, eq=False)
class LowRank(Payload):
    """`a` [rank, in] and `b` [rank, out]; the adapter's scale is folded into `b`."""

    a: Tensor
    b: Tensor


class SharedInput:
    """The stacked A of all sites that read the same input tensor, and the product with it.

    The first site to be called computes the product, its siblings find it by the identity of the
    input, and the last one in call order drops it.
    """

    def __init__(self, a: PackedMatrices, width: int) -> None:
        self.a = a
        # Slots with a product at any site of the group: all of its banks act in a step, or none.
        self.slots: set[int] = set()
        self._width = width
        # Holding the input keeps its identity from being taken over by another tensor.
        self._product: tuple[Tensor, Shrunk] | None = None

    def product(self, x: Tensor, segments: Segments) -> Shrunk:
        """x A^T of each row with the A of its own slot."""
        if self._product is None or self._product[0] is not x:
            self._product = (x, shrink(x.reshape(-1, self._width), self.a, segments))
        return self._product[1]

    def drop_product(self) -> None:
        self._product = None


class LowRankBank(OutputBank):
    """B of one site; its A lie stacked with those of its siblings."""

    in_c = True

    def __init__(
        self, shared: SharedInput, last: bool, b: PackedMatrices, columns: Columns
    ) -> None:
        super().__init__()
        self.slots = shared.slots
        self._shared = shared
        self._last = last
        self._b = b
        self._columns = columns

    def pieces(self, payload: LowRank) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._shared.a, payload.a), (self._b, payload.b))

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        self._columns.set(slot, first_rows[0])

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        expand(y, self._shared.product(x, segments), self._b, self._columns, segments)
        if self._last:
            self._shared.drop_product()
