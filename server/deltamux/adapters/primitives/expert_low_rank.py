"""Low rank at one layer of a mixture of experts: y += (x A_e^T) B_e, e the expert of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from torch import Tensor, nn

from deltamux_kernels.expand import Columns, expand
from deltamux_kernels.packed import ALIGNMENT, PackedMatrices
from deltamux_kernels.segments import Segments
from deltamux_kernels.shrink import shrink


@dataclass(frozen=True, eq=False)
class ExpertLowRank:
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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b)


class ExpertLowRankBank:
    """A and B of one layer; to the kernels each expert of each slot is a slot of its own."""

    def __init__(
        self, a: PackedMatrices, b: PackedMatrices, experts: int, columns: Columns
    ) -> None:
        self.slots: set[int] = set()
        self._stacks = (a, b)
        self._experts = experts
        slots = experts * len(a.views)
        self._a, self._b = (PackedMatrices(s.arena, slots, s.width) for s in self._stacks)
        self._columns = columns

    def pieces(self, payload: ExpertLowRank) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return tuple(zip(self._stacks, payload.tensors, strict=True))

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        for stack, each in zip(self._stacks, (self._a, self._b), strict=True):
            each.divide(slot * self._experts, self._experts, stack, slot)

    def add(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        """`segments` of slot * experts + expert; rows without an adapter here are in none."""
        expand(y, shrink(x, self._a, segments), self._b, self._columns, segments)
