"""A mixture of experts with the adapters that act inside its experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltamux.adapters.primitives.expert_low_rank import ExpertLowRank, ExpertLowRankBank
from deltamux.adapters.primitives.payload import Bank, Payload
from deltamux.adapters.sites.rows import Rows
from deltamux.base.experts import PROJECTIONS, Experts
from deltamux_kernels.expert_linear import expert_linear
from deltamux_kernels.expert_pairs import ExpertPairs, expert_pairs


class ExpertsLayer:
    """One layer of all experts: what a site is, to whoever places adapters."""

    def __init__(self, bank: ExpertLowRankBank) -> None:
        self.banks: dict[type[Payload], Bank] = {ExpertLowRank: bank}
        self.slots: set[int] = set()
        self.bank = bank


class ExpertsSite(nn.Module):
    """On a GPU, a step in which no adapter acts here is left to the base.

    On a CPU all rows are computed here. transformers' own product of an expert takes another path
    for one to three rows, so that a row of the base would depend on how many of its neighbours an
    adapter sends to the same expert.
    """

    def __init__(
        self, experts: Experts, layers: Sequence[ExpertsLayer], rows: Rows, slots: int
    ) -> None:
        super().__init__()
        self.base = experts.module
        self._experts = experts
        self._layers = layers
        self._rows = rows
        self._slots = slots

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [rows, width], the chosen experts and their weights [rows, k] -> [rows, width]."""
        if hidden.is_cuda and not any(map(self._acts, self._layers)):
            y: Tensor = self.base(hidden, chosen, weights)
            return y
        pairs = expert_pairs(chosen, self._rows.tokens, self._slots, self._experts.count)
        y = self._compute(hidden[pairs.order // chosen.shape[1]], pairs)
        y = y * weights.flatten()[pairs.order, None]
        weighted = torch.empty_like(y)
        weighted[pairs.order] = y
        return weighted.view(*chosen.shape, -1).sum(1).to(hidden.dtype)

    def _acts(self, layer: ExpertsLayer) -> bool:
        return not layer.slots.isdisjoint(self._rows.tokens.slots)

    def _compute(self, x: Tensor, pairs: ExpertPairs) -> Tensor:
        """What each pair's expert makes of its input `x` [pairs, width]."""
        for projection, layer in zip(PROJECTIONS, self._layers, strict=True):
            weight, bias = self._experts.weight(projection), self._experts.bias(projection)
            y = expert_linear(x, weight, bias, pairs)
            if self._acts(layer):
                layer.bank.add(y, x, pairs.segments)
            x = self._experts.gate(y) if projection == PROJECTIONS[0] else y
        return x
