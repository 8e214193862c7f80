"""Low rank at one layer of a mixture of experts: y += (x A_e^T) B_e, e the expert of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from torch import Tensor, nn

from deltamux.adapters.primitives.payload import Bank, Payload
from deltamux_kernels.expand import Columns, expand
from deltamux_kernels.packed import ALIGNMENT, DividedMatrices, PackedMatrices
from deltamux_kernels.segments import Segments
from deltamux_kernels.shrink import shrink


@dataclass(frozen=True, eq=False)
class ExpertLowRank(Payload):
    """`a` [experts * rank, in] and `b` [experts * rank, out], one expert's rows after the other's;
    the adapter's scale is folded into `b`."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> ExpertLowRank:
        """From a [experts, rank, in] and b [experts, rank, out].

        Every expert's matrices have to begin where the kernels can load: rows of zeros see to it
        where the widths do not.
        """
        rank, multiple = a.shape[1], ALIGNMENT // gcd(ALIGNMENT, a.shape[2], b.shape[2])
        padding = (0, 0, 0, -rank % multiple)
        return cls(*(nn.functional.pad(m, padding).flatten(0, 1).contiguous() for m in (a, b)))


class ExpertLowRankBank(Bank):
    """A and B of one layer; to the kernels each expert of each slot is a slot of its own."""

    def __init__(self, a: DividedMatrices, b: DividedMatrices, columns: Columns) -> None:
        super().__init__()
        self._a, self._b = a, b
        self._columns = columns

    def pieces(self, payload: ExpertLowRank) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._a, payload.a), (self._b, payload.b))

    def add(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        """`segments` of slot * experts + expert; rows without an adapter here may be in one."""
        h = shrink(x, self._a.parts, segments)
        expand(y, h, self._b.parts, self._columns, segments)
