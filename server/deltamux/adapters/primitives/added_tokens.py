"""Added tokens: those of an adapter's own behind the last one of the base's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.primitives.payload import InputBank
from deltamux.adapters.primitives.token_rows import EmbeddingTokenBank, TokenBank, TokenRows
from deltamux_kernels.segments import Segments
from deltamux_kernels.token_rows import TokenTable, token_columns


@dataclass(frozen=True, eq=False)
class AddedTokens(TokenRows):
    """Token rows, whose `ids` follow those of the base without a gap."""


class AddedEmbeddingBank(EmbeddingTokenBank, InputBank):
    """Gives them their rows; `known` counts the tokens of the base's embedding."""

    def __init__(self, table: TokenTable, known: int) -> None:
        super().__init__(table)
        self._known = known

    def before(self, x: Tensor, segments: Segments) -> Tensor:
        """Ids that the base's embedding has."""
        return x.clamp(max=self._known - 1)


class AddedColumnsBank(TokenBank):
    """Gives them logits behind those of the base's tokens."""

    def columns(self, segments: Segments) -> int:
        """How many the logits of these rows have more than the base's."""
        return segments.most_rows(self._table.rows)

    def widen(self, x: Tensor, y: Tensor, segments: Segments) -> Tensor:
        """`y` [..., V] with as many columns more as any row of the step has added tokens.

        Behind those of a row that has fewer stand zeros, which nobody may read.
        """
        added = y.new_zeros(*y.shape[:-1], self.columns(segments))
        wide = torch.cat((y, added), dim=-1)
        token_columns(wide.view(-1, wide.shape[-1]), x.flatten(0, -2), self._table, segments)
        return wide
