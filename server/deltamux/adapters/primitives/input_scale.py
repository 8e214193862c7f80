"""Input scale: the module is given x * g, one vector an adapter (IA3's feed-forward modules)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import InputBank, Payload
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.row_affine import row_affine
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class InputScale(Payload):
    """`scale` [in]."""

    scale: Tensor


class InputScaleBank(InputBank):
    """One row of `in` numbers a slot.

    Siblings that read the same input still see the unscaled one, so a product that they share
    stays theirs.
    """

    in_c = True

    def __init__(self, scales: PackedMatrices) -> None:
        super().__init__()
        self._scales = scales

    def pieces(self, payload: InputScale) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._scales, payload.scale[None]),)

    def before(self, x: Tensor, segments: Segments) -> Tensor:
        scaled = x.clone()
        row_affine(scaled.view(-1, self._scales.width), None, self._scales, segments)
        return scaled
