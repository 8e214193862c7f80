"""Block rotations: a block-diagonal transform of a module's input (OFT, BOFT) or output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import Bank, InputBank, OutputBank, Payload
from deltamux_kernels.block_rotate import block_rotate
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class InputRotation(Payload):
    """`blocks` [b, in]: in / b blocks side by side; a row x of the input becomes x R."""

    blocks: Tensor


@dataclass(frozen=True, eq=False)
class OutputRotation(Payload):
    """`blocks` [b, out]; a row y of the output becomes y R."""

    blocks: Tensor


class _Rotations(Bank):
    """The blocks of one site, [b, width] a slot, b the slot's own."""

    def __init__(self, blocks: PackedMatrices) -> None:
        super().__init__()
        self._blocks = blocks

    def pieces(
        self, payload: InputRotation | OutputRotation
    ) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._blocks, payload.blocks),)


class InputRotationBank(_Rotations, InputBank):
    """Siblings that read the same input still see it as it was."""

    def before(self, x: Tensor, segments: Segments) -> Tensor:
        rotated, width = x.clone(), self._blocks.width
        block_rotate(rotated.view(-1, width), x.reshape(-1, width), self._blocks, segments)
        return rotated


class OutputRotationBank(_Rotations, OutputBank):
    """The rows of each slot are rotated in place."""

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        block_rotate(y, y.clone(), self._blocks, segments)
