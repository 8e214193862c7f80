"""Pair rotation: each output feature mixed with one partner, after the bias (RoAd)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.pair_rotate import PairFactors, distance_elements, pair_rotate
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class PairRotation(Payload):
    """`factors` [2, out]: of a feature itself and of its partner, `distance` features away.

    Features are cut into groups of twice the distance; the two halves of a group are partners.
    """

    factors: Tensor
    distance: int


class PairRotationBank(OutputBank):
    """Two rows of `out` numbers and a distance a slot."""

    def __init__(self, factors: PairFactors) -> None:
        super().__init__()
        self._factors = factors

    def pieces(self, payload: PairRotation) -> Sequence[tuple[PackedMatrices, Tensor]]:
        distance = distance_elements(payload.distance, payload.factors.dtype)
        return ((self._factors.factors, payload.factors), (self._factors.distances, distance))

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        self._factors.placed(slot)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        pair_rotate(y, self._factors, segments)
