"""SHiRA in PEFT's format: a few numbers of each weight matrix, trained where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.patterns import Selector
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import LINEAR, read_selector, targeted_sites
from deltamux.adapters.primitives.sparse_delta import SparseDelta
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import InvalidArgument

_VALUES, _INDICES = "shira_weight", "shira_indices"

# How places and numbers were first drawn; both are in the file.
_HARMLESS = ("fan_in_fan_out", "init_weights", "mask_type", "random_seed")

_MAX_RANK = (1 << 31) - 1


class Shira:
    """A module of n inputs and m outputs has r (m + n) numbers, as many as LoRA of rank r."""

    name = "shira"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "SHIRA"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        config = _read_config(manifest.fields)
        parts = {part: part for part in (_VALUES, _INDICES)}
        modules = ModuleTensors(tensors, structure, parts, integers=(_INDICES,))
        notes = modules.drop_base_copies()
        payloads = {
            site.name: (_payload(site, modules, config.rank, dtype),)
            for site in targeted_sites(config.selector, structure, LINEAR)
        }
        modules.require_none_left()
        return Parsed(payloads, rank=0, parameters=modules.taken, notes=notes)


@dataclass(frozen=True, eq=False)
class _Config:
    selector: Selector
    rank: int


def _read_config(values: Mapping[str, Json]) -> _Config:
    with tuner_fields(values, _HARMLESS) as fields:
        rank = as_integer("r", fields.take("r"), 1, _MAX_RANK)
        return _Config(read_selector(fields), rank)


def _payload(site: SiteSpec, modules: ModuleTensors, rank: int, dtype: torch.dtype) -> SparseDelta:
    values = modules.take(site.name, _VALUES, 1)
    indices = modules.take(site.name, _INDICES, 2)
    expected = rank * (site.in_features + site.out_features)
    if values.shape[0] != expected or indices.shape != (2, expected):
        raise InvalidArgument(
            f"{site.name}: {_VALUES} of {tuple(values.shape)} and {_INDICES} of "
            f"{tuple(indices.shape)}, where r = {rank} makes {expected} numbers",
            reason="RANK_MISMATCH",
        )
    rows, columns = indices.long()
    if indices.min() < 0 or rows.max() >= site.out_features or columns.max() >= site.in_features:
        raise other_base(site, f"{_INDICES} up to ({rows.max()}, {columns.max()})")
    return SparseDelta.of(rows, columns, to_serving(site, values, dtype), site.out_features)
