"""Scales of the output, one vector an adapter: around the bias (DoRA's magnitude over row norm), or
of the whole (IA3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.row_affine import row_affine
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class RowScale(Payload):
    """`scale` [out]; the base module's bias is not scaled."""

    scale: Tensor


@dataclass(frozen=True, eq=False)
class OutputScale(Payload):
    """`scale` [out]; the base module's bias is scaled too."""

    scale: Tensor


class RowScaleBank(OutputBank):
    """One row of `out` numbers a slot: y = (y - bias) * g + bias, `bias` None for zero."""

    in_c = True

    def __init__(self, scales: PackedMatrices, bias: Tensor | None) -> None:
        super().__init__()
        self._scales = scales
        self._bias = bias

    def pieces(self, payload: RowScale | OutputScale) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._scales, payload.scale[None]),)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        row_affine(y, self._bias, self._scales, segments)
