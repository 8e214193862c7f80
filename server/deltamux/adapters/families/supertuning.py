"""Super-Tuning in PEFT's format: a few numbers of each weight matrix, and perhaps LoRA beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_number, refuse_field, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import parse_modules
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.per_module import as_rank, as_scale
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import Targets, read_targets
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.sparse_delta import SparseDelta
from deltamux.base.structure import SiteSpec, Structure

_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"

# How numbers were first drawn and places chosen; both are in the file.
_HARMLESS = ("init_weights", "lora_dropout", "select_top")


class Supertuning:
    """Places are counted along the rows of the weight."""

    name = "supertuning"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "SUPERTUNING"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        config = _read_config(manifest.fields)
        parts = {part: part for part in (_VALUES, _PLACES, _A, _B)}
        modules = ModuleTensors(tensors, structure, parts, integers=(_PLACES,))

        def read(site: SiteSpec) -> list[Payload]:
            payloads: list[Payload] = [_sparse(site, modules, config)]
            if config.rank:
                a = modules.take_shaped(site, _A, (config.rank, site.in_features))
                b = modules.take_shaped(site, _B, (site.out_features, config.rank))
                payloads.append(LowRank(a, (b * config.scale).T))
            return payloads

        sites = config.targets.sites(structure)
        return parse_modules(config.targets, sites, modules, structure, dtype, read)


@dataclass(frozen=True, eq=False)
class _Config:
    targets: Targets
    sparsity: float
    # Of LoRA; 0 without.
    rank: int
    scale: float


def _read_config(values: Mapping[str, Json]) -> _Config:
    with tuner_fields(values, _HARMLESS) as fields:
        if not fields.take_bool("save_precomputed_indices", True):
            raise unsupported("Super-Tuning whose places are not in the file")
        sparsity = fields.take("sparsity", 0.99)
        if sparsity not in (0, 0.0):
            sparsity = as_number("sparsity", sparsity, 1)
        rank, alpha = fields.take("r"), fields.take("lora_alpha")
        if rank is None and alpha is not None:
            refuse_field("lora_alpha", alpha, "missing where r is")
        rank = 0 if rank is None else as_rank("r", rank)
        alpha = 2.0 * rank if alpha is None else as_scale("lora_alpha", alpha)
        scale = alpha / rank if rank else 0.0
        return _Config(read_targets(fields), float(sparsity), rank, scale)


def _sparse(site: SiteSpec, modules: ModuleTensors, config: _Config) -> SparseDelta:
    elements = site.in_features * site.out_features
    shape = (int(elements * (1 - config.sparsity)),)
    values = modules.take_shaped(site, _VALUES, shape)
    places = modules.take(site.name, _PLACES, 1).long()
    if places.shape != shape or places.min() < 0 or places.max() >= elements:
        raise other_base(site, f"{_PLACES} of {tuple(places.shape)} up to {places.max()}")
    rows, columns = places // site.in_features, places % site.in_features
    return SparseDelta.of(rows, columns, values, site.out_features)
