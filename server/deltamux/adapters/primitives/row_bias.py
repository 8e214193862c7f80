"""Row bias: y += c, one vector an adapter (PEFT's lora_bias, trained biases less the base's)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.row_bias import row_bias
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class RowBias(Payload):
    """`bias` [out]; the adapter's scale is folded in."""

    bias: Tensor


class RowBiasBank(OutputBank):
    """One row of `out` numbers a slot."""

    in_c = True

    def __init__(self, biases: PackedMatrices) -> None:
        super().__init__()
        self._biases = biases

    def pieces(self, payload: RowBias) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._biases, payload.bias[None]),)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        row_bias(y, self._biases, segments)
