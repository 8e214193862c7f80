"""Row bias: y += c, one vector an adapter (PEFT's lora_bias, trained biases less the base's)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import Payload
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.row_bias import row_bias
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class RowBias(Payload):
    """`bias` [out]; the adapter's scale is folded in."""

    bias: Tensor


class RowBiasBank:
    """One row of `out` numbers a slot."""

    def __init__(self, biases: PackedMatrices) -> None:
        self.slots: set[int] = set()
        self._biases = biases

    def pieces(self, payload: RowBias) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._biases, payload.bias[None]),)

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        """Nothing to keep: a bias is alone in its store."""

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        row_bias(y, self._biases, segments)
