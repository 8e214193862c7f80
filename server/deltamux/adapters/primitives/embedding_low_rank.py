"""Low rank at an embedding: y += A[:, id] B, a lookup in place of the product with A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.embedding_shrink import embedding_shrink
from deltamux_kernels.expand import Columns, expand
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class EmbeddingLowRank(Payload):
    """`a` [rank, vocabulary] and `b` [rank, out]; all scales are folded into `b`."""

    a: Tensor
    b: Tensor


class EmbeddingLowRankBank(OutputBank):
    """A and B of one embedding."""

    def __init__(self, a: PackedMatrices, b: PackedMatrices, columns: Columns) -> None:
        super().__init__()
        self._a = a
        self._b = b
        self._columns = columns

    def pieces(self, payload: EmbeddingLowRank) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._a, payload.a), (self._b, payload.b))

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        self._columns.set(slot, 0)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        h = embedding_shrink(x.reshape(-1), self._a, segments)
        expand(y, h, self._b, self._columns, segments)
