"""A mixture of experts with the adapters that act inside its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltamux.adapters.primitives.expert_low_rank import ExpertLowRank, ExpertLowRankBank
from deltamux.adapters.primitives.payload import Bank, Payload
from deltamux.adapters.rows import Rows
from deltamux.base.experts import PROJECTIONS, Experts
from deltamux_kernels.segments import Segments, Span

Array = np.ndarray[Any, Any]


# From so many rows on, a product on a CPU computes a row the same way beside any others.
_LEAST_ROWS = 4


@dataclass(frozen=True)
class _Pairs:
    """Each row with each of its experts: by expert, and those of one expert by slot.

    `order` is theirs among the pairs as the rows have them.
    """

    order: Array
    # (expert, start, end) of the pairs of each expert.
    experts: tuple[Span, ...]
    # (expert, slot, start, end) of those of each of its slots, -1 for the base's.
    groups: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, experts: Array, slots: Array) -> _Pairs:
        order = np.lexsort((slots, experts))
        experts, slots = experts[order], slots[order]
        groups = _runs(np.diff(experts, prepend=-1) | np.diff(slots, prepend=-2))
        return cls(
            order,
            tuple((int(experts[s]), s, e) for s, e in _runs(np.diff(experts, prepend=-1))),
            tuple((int(experts[s]), int(slots[s]), s, e) for s, e in groups),
        )


def _runs(changes: Array) -> list[tuple[int, int]]:
    """Start and end of the runs that begin wherever `changes` is not 0."""
    starts = np.flatnonzero(changes).tolist()
    return list(zip(starts, [*starts[1:], len(changes)], strict=True))


class ExpertsLayer:
    """One layer of all experts: what a site is, to whoever places adapters."""

    def __init__(self, bank: ExpertLowRankBank, experts: int) -> None:
        self.banks: dict[type[Payload], Bank] = {ExpertLowRank: bank}
        self.slots: set[int] = set()
        self._bank = bank
        self._experts = experts

    def add(self, y: Tensor, x: Tensor, pairs: _Pairs) -> None:
        """Adds to the output `y` of the pairs what adapters make of their input `x`."""
        spans = [
            (slot * self._experts + expert, start, end)
            for expert, slot, start, end in pairs.groups
            if slot in self.slots
        ]
        if spans:
            self._bank.add(y, x, Segments.build(spans, x.device))


class ExpertsSite(nn.Module):
    """On a GPU, rows of adapters that act here are computed apart from those of the base.

    On a CPU all rows are computed here. transformers' own product of an expert takes another path
    for one to three rows, so that a row of the base would depend on how many of its neighbours an
    adapter sends to the same expert.
    """

    def __init__(self, experts: Experts, layers: Sequence[ExpertsLayer], rows: Rows) -> None:
        super().__init__()
        self.base = experts.module
        self._experts = experts
        self._layers = layers
        self._rows = rows

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [rows, width], the chosen experts and their weights [rows, k] -> [rows, width]."""
        if hidden.is_cuda and not self._acts():
            y: Tensor = self.base(hidden, chosen, weights)
            return y
        num_rows, _ = hidden.shape
        slots = self._slots_of_rows(num_rows)
        own = slots >= 0 if hidden.is_cuda else np.full(len(slots), True)
        if own.all():
            return self._compute(hidden, chosen, weights, slots)
        here, others = (
            torch.from_numpy(np.flatnonzero(rows)).to(hidden.device) for rows in (own, ~own)
        )
        out = torch.empty_like(hidden)
        out[here] = self._compute(hidden[here], chosen[here], weights[here], slots[own])
        out[others] = self.base(hidden[others], chosen[others], weights[others])
        return out

    def _acts(self) -> bool:
        return not all(layer.slots.isdisjoint(self._rows.tokens.slots) for layer in self._layers)

    def _slots_of_rows(self, rows: int) -> Array:
        """The slot of each row whose adapter acts here, -1 for all others."""
        slots = np.full(rows, -1)
        for slot, start, end in self._rows.tokens.spans:
            if any(slot in layer.slots for layer in self._layers):
                slots[start:end] = slot
        return slots

    def _compute(self, hidden: Tensor, chosen: Tensor, weights: Tensor, slots: Array) -> Tensor:
        k = chosen.shape[1]
        pairs = _Pairs.of(chosen.flatten().cpu().numpy(), slots.repeat(k))
        order = torch.from_numpy(pairs.order).to(hidden.device)
        x = hidden[order // k]
        for projection, layer in zip(PROJECTIONS, self._layers, strict=True):
            y = self._product(projection, x, pairs)
            layer.add(y, x, pairs)
            x = self._experts.gate(y) if projection == PROJECTIONS[0] else y
        weighted = torch.empty_like(x)
        weighted[order] = x * weights.flatten()[order, None].to(x.dtype)
        return weighted.view(-1, k, x.shape[1]).sum(1)

    def _product(self, projection: str, x: Tensor, pairs: _Pairs) -> Tensor:
        """The base's own product of each pair with its expert's weight."""
        weight, bias = self._experts.weight(projection), self._experts.bias(projection)
        y = x.new_empty(x.shape[0], weight.shape[1])
        for expert, start, end in pairs.experts:
            rows = nn.functional.pad(x[start:end], (0, 0, 0, max(0, _LEAST_ROWS - end + start)))
            own = None if bias is None else bias[expert]
            y[start:end] = nn.functional.linear(rows, weight[expert], own)[: end - start]
        return y
