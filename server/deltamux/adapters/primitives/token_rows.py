"""Token rows: rows of the adapter's own for a few tokens, at the embedding and at the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.primitives.payload import Bank, OutputBank, Payload
from deltamux_kernels.packed import PackedMatrices, as_elements
from deltamux_kernels.segments import Segments
from deltamux_kernels.token_rows import TokenTable, token_columns, token_rows


@dataclass(frozen=True, eq=False)
class TokenRows(Payload):
    """`ids` int32 [tokens], ascending, and the `rows` [tokens, width] of the table for them.

    At an embedding the base's scale of its embeddings is folded in.
    """

    ids: Tensor
    rows: Tensor

    @classmethod
    def of(cls, ids: Sequence[int], rows: Tensor) -> TokenRows:
        """From rows in the order of their different `ids`."""
        ascending, order = torch.tensor(ids).sort()
        return cls(ascending.int(), rows[order].contiguous())


class TokenBank(Bank):
    """The rows of all slots at one site."""

    def __init__(self, table: TokenTable) -> None:
        super().__init__()
        self._table = table

    def pieces(self, payload: TokenRows) -> Sequence[tuple[PackedMatrices, Tensor]]:
        ids = as_elements(payload.ids, payload.rows.dtype)
        return ((self._table.ids, ids), (self._table.rows, payload.rows))

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        self._table.placed(slot)


class EmbeddingTokenBank(TokenBank, OutputBank):
    """An embedding gives these tokens their own rows."""

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        token_rows(y, x.reshape(-1), self._table, segments)


class HeadTokenBank(TokenBank, OutputBank):
    """A head without bias gives these tokens logits from their own rows."""

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        token_columns(y, x.flatten(0, -2), self._table, segments)
