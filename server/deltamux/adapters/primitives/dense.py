"""Dense matrices: the adapter's own weight or embeddings in place of the base's, or a delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.embedding_rows import embedding_rows
from deltamux_kernels.grouped_dense import dense_delta, grouped_dense
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class Dense(Payload):
    """`weight` [out, in] and, where the module has one, `bias` [out]."""

    weight: Tensor
    bias: Tensor | None = None


class DenseBank(OutputBank):
    """A weight matrix a slot; the rows of the slot get its product, whatever the base gave them."""

    def __init__(self, weights: PackedMatrices, biases: PackedMatrices) -> None:
        super().__init__()
        self._weights = weights
        self._biases = biases

    def pieces(self, payload: Dense) -> Sequence[tuple[PackedMatrices, Tensor]]:
        weight = (self._weights, payload.weight)
        return (weight,) if payload.bias is None else (weight, (self._biases, payload.bias[None]))

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        grouped_dense(y, x.flatten(0, -2), self._weights, self._biases, segments)


@dataclass(frozen=True, eq=False)
class DenseDelta(Payload):
    """`delta` [out, in], for changes of a weight that have no smaller exact form."""

    delta: Tensor


class DenseDeltaBank(OutputBank):
    """A matrix a slot; the rows of the slot get its product beside the base's."""

    def __init__(self, deltas: PackedMatrices) -> None:
        super().__init__()
        self._deltas = deltas

    def pieces(self, payload: DenseDelta) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._deltas, payload.delta),)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        dense_delta(y, x.flatten(0, -2), self._deltas, segments)


@dataclass(frozen=True, eq=False)
class DenseEmbedding(Payload):
    """`table` [vocabulary, out]; the base's scale of its embeddings is folded in."""

    table: Tensor


class DenseEmbeddingBank(OutputBank):
    """An embedding table a slot."""

    def __init__(self, tables: PackedMatrices) -> None:
        super().__init__()
        self._tables = tables

    def pieces(self, payload: DenseEmbedding) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._tables, payload.table),)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        # An added token has its row elsewhere.
        embedding_rows(y, x.reshape(-1), self._tables, segments)
