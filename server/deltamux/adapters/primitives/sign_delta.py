"""One-bit delta: y += a (x D^T) with D of 1 and -1, a bit a weight, at a linear site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments
from deltamux_kernels.sign_delta import SignMatrices, sign_delta


@dataclass(frozen=True, eq=False)
class SignDelta(Payload):
    """`words` int32 [out, in / 32, rounded up] as `pack_signs` makes them, `scale` float32 [1]."""

    words: Tensor
    scale: Tensor


class SignDeltaBank(OutputBank):
    """The signs and scales of one site."""

    def __init__(self, matrices: SignMatrices) -> None:
        super().__init__()
        self._matrices = matrices

    def pieces(self, payload: SignDelta) -> Sequence[tuple[PackedMatrices, Tensor]]:
        words, scale = self._matrices.elements(payload.words, payload.scale)
        return ((self._matrices.words, words), (self._matrices.scales, scale))

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        sign_delta(y, x.flatten(0, -2), self._matrices, segments)
