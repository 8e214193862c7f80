"""Virtual tokens: places in front of a prompt that hold what was trained instead of a token.

Either their embeddings are the adapter's (prompt tuning), and everything above is computed; or
their keys and values are, in every layer (prefix tuning), and nothing is. A row of an adapter's
virtual token number j has -1 - j where others have a token id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.primitives.payload import Bank, InputBank, OutputBank, Payload
from deltamux_kernels.packed import PackedMatrices, as_elements
from deltamux_kernels.segments import Segments
from deltamux_kernels.token_rows import TokenTable, token_rows


@dataclass(frozen=True)
class Virtual:
    """How many virtual tokens an adapter has; `computed` unless it brings their keys and values.

    `counted`: they take positions, so that a prompt begins at that of number `tokens`.
    """

    tokens: int
    computed: bool = True
    counted: bool = True

    @property
    def uncounted(self) -> int:
        """By how much positions stay behind places."""
        return 0 if self.counted else self.tokens


NO_VIRTUAL = Virtual(0)


@dataclass(frozen=True, eq=False)
class VirtualTokens(Payload):
    """`rows` [tokens, width]: what the model's embedding gives for them, its scale included."""

    rows: Tensor

    @property
    def virtual(self) -> Virtual:
        return Virtual(self.rows.shape[0])


class VirtualTokensBank(InputBank, OutputBank):
    """y = rows[j] where the id is -1 - j."""

    def __init__(self, table: TokenTable) -> None:
        super().__init__()
        self._table = table

    def pieces(self, payload: VirtualTokens) -> Sequence[tuple[PackedMatrices, Tensor]]:
        ids = torch.arange(-payload.virtual.tokens, 0, dtype=torch.int32)
        return (
            (self._table.ids, as_elements(ids, payload.rows.dtype)),
            (self._table.rows, payload.rows.flip(0)),
        )

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        self._table.placed(slot)

    def before(self, x: Tensor, segments: Segments) -> Tensor:
        """Ids that the base's embedding has."""
        return x.clamp(min=0)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        token_rows(y, x.reshape(-1), self._table, segments)


@dataclass(frozen=True, eq=False)
class KeyValuePrefix(Payload):
    """`states` [layers, 2, tokens, kv_heads * dim]: keys, then values, of each layer.

    The prompt begins at position `tokens`, or at 0 where they are not `counted`.
    """

    states: Tensor
    counted: bool = True

    @property
    def virtual(self) -> Virtual:
        return Virtual(self.states.shape[2], computed=False, counted=self.counted)


class KeyValuePrefixBank(Bank):
    """Keys and values from which a sequence's first pages are filled; it acts at no module."""

    def __init__(self, states: PackedMatrices, num_layers: int) -> None:
        super().__init__()
        self._states = states
        self._num_layers = num_layers

    def pieces(self, payload: KeyValuePrefix) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return ((self._states, payload.states.flatten(0, 2)),)

    def states(self, slot: int) -> Tensor:
        """[layers, 2, tokens, kv_heads * dim] of an adapter that has a prefix."""
        states = self._states.views[slot]
        assert states is not None
        return states.view(self._num_layers, 2, -1, states.shape[1])
