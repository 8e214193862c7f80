"""Tuners that scale what they add by alpha / r, each module by its own (those after LyCORIS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltamux.adapters.peft.low_rank_family import Tuner
from deltamux.adapters.peft.per_module import PerModule
from deltamux.base.structure import SiteSpec


@dataclass(frozen=True, eq=False)
class ScaledTuner(Tuner):
    """Subclasses say what is scaled."""

    ranks: PerModule[int]
    alphas: PerModule[float]

    @property
    def tables(self) -> Sequence[PerModule[Any]]:
        return (self.ranks, self.alphas)

    def rank_and_scale(self, site: SiteSpec) -> tuple[int, float]:
        rank = self.ranks.of(site.name)
        return rank, self.alphas.of(site.name) / rank
