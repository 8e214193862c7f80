"""TinyLoRA in PEFT's format: a few trained numbers mix frozen random squares between A and B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import MAX_RANK, as_rank
from deltamux.adapters.peft.seeds import as_kept, as_seed
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"

_HARMLESS = ("fan_in_fan_out", "init_v_bound", "init_weights", "tinylora_dropout")


class TinyLora(ModuleFamily):
    """B (v1 P1 + ... + vu Pu) A; neighbours in the model's order share v with `weight_tying`."""

    name = "tinylora"
    peft_types = ("TINYLORA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            saved = fields.take_bool("save_projection", True)
            return _TinyLora(
                read_targets(fields, "tinylora_only"),
                Names((_A, _B, _P) if saved else (_A, _B)),
                as_rank("r", fields.take("r")),
                as_integer("u", fields.take("u"), 1, MAX_RANK),
                _tying(fields.take("weight_tying")),
                as_seed("projection_seed", fields.take("projection_seed")),
            )


def _tying(value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        refuse_field("weight_tying", value, "a number from 0 to 1")
    return float(value)


@dataclass(frozen=True, eq=False)
class _TinyLora(LowRankTuner):
    rank: int
    vectors: int
    tying: float
    seed: int

    def names_at(self, sites: Sequence[SiteSpec]) -> Names:
        """With those of the trained vectors, one for each group of neighbours."""
        last = self._group(len(sites) - 1, len(sites))
        return replace(self.names, shared=tuple(f"tinylora_v.{n}" for n in range(last + 1)))

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        names = self.names_at(sites).shared
        return [modules.take_shared(name, (self.vectors,)) for name in names]

    def change(self, site: SiteSpec, given: Given) -> Factors:
        rank = self._rank_at(site)
        a = given.modules.take_shaped(site, _A, (rank, site.in_features))
        b = given.modules.take_shaped(site, _B, (site.out_features, rank))
        vector = given.shared[self._group(given.places[site.name], len(given.places))]
        return a, b @ torch.einsum("i,ijk->jk", vector, self._squares(site, given))

    def _group(self, place: int, modules: int) -> int:
        groups = max(1, round(modules * (1 - self.tying)))
        return min(place // max(1, modules // groups), groups - 1)

    def _rank_at(self, site: SiteSpec) -> int:
        return min(self.rank, site.in_features, site.out_features)

    def _squares(self, site: SiteSpec, given: Given) -> Tensor:
        """[u, rank, rank], from the file or drawn anew."""
        rank = self._rank_at(site)
        shape = (self.vectors, rank, rank)
        if _P in self.names.parts:
            return given.modules.take_shaped(site, _P, shape)
        generator = torch.Generator().manual_seed(self.seed + given.places[site.name])
        drawn = torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=shape, generator=generator)
        return as_kept(drawn, site, given.structure)
