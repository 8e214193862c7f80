"""What the config of an adapter says that changes modules one by one, and what it makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from deltamux.adapters.payloads.low_rank_delta import Change, smallest
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import PerModule
from deltamux.adapters.peft.targets import LINEAR, Targets
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import Kind, SiteSpec, Structure


@dataclass(frozen=True, eq=False)
class Given:
    """What the payloads of a module may be made of."""

    modules: ModuleTensors
    structure: Structure
    # The targeted modules in the order in which the model holds them.
    sites: Sequence[SiteSpec]
    shared: Sequence[Tensor]

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Which of the modules one is, by its name."""
        return {site.name: place for place, site in enumerate(self.sites)}


@dataclass(frozen=True, eq=False)
class Tuner(ABC):
    """Families add what their arithmetic asks for."""

    targets: Targets
    names: Names
    kinds: ClassVar[frozenset[Kind]] = LINEAR

    @property
    def tables(self) -> Sequence[PerModule[Any]]:
        """The ranks and scales whose keys have to mean targeted modules."""
        return ()

    def names_at(self, sites: Sequence[SiteSpec]) -> Names:
        """`names`, with those that depend on which modules are targeted."""
        return self.names

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        """Checks what concerns all modules, and takes the tensors that they share.

        The sites come in the order in which the model holds them.
        """
        return ()

    @abstractmethod
    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        """Of a module, in float32. Raises as Family.parse does."""


class LowRankTuner(Tuner):
    """Adds one product to a module's output."""

    @abstractmethod
    def change(self, site: SiteSpec, given: Given) -> Change:
        """What is added to the weight of a module."""

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        payload = smallest(site, self.change(site, given))
        return () if payload is None else (payload,)


@dataclass(frozen=True, eq=False)
class ScaledTuner(LowRankTuner):
    """Scales what it adds by alpha / r, each module by its own (those after LyCORIS)."""

    ranks: PerModule[int]
    alphas: PerModule[float]

    @property
    def tables(self) -> Sequence[PerModule[Any]]:
        return (self.ranks, self.alphas)

    def rank_and_scale(self, site: SiteSpec) -> tuple[int, float]:
        rank = self.ranks.of(site.name)
        return rank, self.alphas.of(site.name) / rank
