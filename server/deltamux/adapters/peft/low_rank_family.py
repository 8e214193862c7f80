"""What families have in common that add one product to each targeted module's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.low_rank_delta import Change, smallest
from deltamux.adapters.peft.module_family import parse_modules
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.per_module import PerModule
from deltamux.adapters.peft.targets import Targets
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec, Structure


@dataclass(frozen=True)
class Names:
    """How the tensors of an adapter are called, as ModuleTensors takes them."""

    parts: tuple[str, ...]
    integers: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Given:
    """What the change of a module may be made of."""

    modules: ModuleTensors
    structure: Structure
    shared: Sequence[Tensor]
    # The places of the targeted modules in the order in which the model holds them.
    places: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Tuner(ABC):
    """What the config of one adapter says; its families add what their arithmetic asks for."""

    targets: Targets
    names: Names

    @property
    def tables(self) -> Sequence[PerModule[Any]]:
        """The ranks and scales whose keys have to mean targeted modules."""
        return ()

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        """Checks what concerns all modules, and takes the tensors that they share.

        The sites come in the order in which the model holds them.
        """
        return ()

    @abstractmethod
    def change(self, site: SiteSpec, given: Given) -> Change:
        """What is added to the weight of a module."""


class LowRankFamily(ABC):
    """Reads a config into a tuner, and asks it for the change of each module."""

    name: str
    peft_types: tuple[str, ...]

    @abstractmethod
    def read(self, manifest: Manifest) -> Tuner:
        """Raises as `parse` does."""

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type in self.peft_types

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        tuner = self.read(manifest)
        names = tuner.names
        parts = {part: part for part in names.parts}
        modules = ModuleTensors(
            tensors, structure, parts, integers=names.integers, shared=names.shared
        )
        sites = tuner.targets.sites_in_model_order(structure, tuner.tables)
        places = {site.name: place for place, site in enumerate(sites)}
        given = Given(modules, structure, tuner.prepare(modules, sites), places)

        def read(site: SiteSpec) -> list[Payload]:
            payload = smallest(site, tuner.change(site, given))
            return [] if payload is None else [payload]

        return parse_modules(tuner.targets, sites, modules, structure, dtype, read)
