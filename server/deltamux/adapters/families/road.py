"""RoAd in PEFT's format: the output of a module is rotated and scaled in pairs, with its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import parse_modules
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import Targets, read_targets
from deltamux.adapters.primitives.pair_rotation import PairRotation
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec, Structure

_ANGLES, _SCALES = "road_theta", "road_alpha"

# Trained angles, and as many scales, for each pair of features.
_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}

_MAX_GROUP = 1 << 20


class Road:
    """One angle a pair, one a feature, or two a feature."""

    name = "road"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "ROAD"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        config = _read_config(manifest.fields)
        modules = ModuleTensors(tensors, structure, {p: p for p in (_ANGLES, _SCALES)})

        def read(site: SiteSpec) -> list[Payload]:
            if site.out_features % config.group:
                raise other_base(site, f"groups of {config.group} features")
            shape = (site.out_features // 2 * config.per_pair,)
            angles, scales = (modules.take_shaped(site, part, shape) for part in (_ANGLES, _SCALES))
            return [PairRotation(_factors(angles, scales, config), config.group // 2)]

        sites = config.targets.sites(structure)
        return parse_modules(config.targets, sites, modules, structure, dtype, read)


@dataclass(frozen=True, eq=False)
class _Config:
    targets: Targets
    per_pair: int
    group: int


def _read_config(values: Mapping[str, Json]) -> _Config:
    with tuner_fields(values, ("init_weights",)) as fields:
        variant = fields.take("variant", "road_1")
        if not isinstance(variant, str) or variant not in _VARIANTS:
            refuse_field("variant", variant, " or ".join(_VARIANTS))
        group = as_integer("group_size", fields.take("group_size", 64), 2, _MAX_GROUP)
        if group % 2:
            refuse_field("group_size", group, "an even number")
        return _Config(read_targets(fields), _VARIANTS[variant], group)


def _factors(angles: Tensor, scales: Tensor, config: _Config) -> Tensor:
    """Of each feature and of its partner, [2, out]."""
    half = config.group // 2
    own, other = scales * angles.cos(), scales * angles.sin()
    if config.per_pair == 1:
        own, other = (t.view(-1, 1, half).expand(-1, 2, half) for t in (own, other))
    elif config.per_pair == 2:
        own, other = (t.view(-1, 2, half) for t in (own, other))
    else:
        own, other = (t.view(-1, 2, 2, half)[:, i] for i, t in enumerate((own, other)))
    signed = torch.stack((-other[:, 0], other[:, 1]), 1)
    return torch.stack((own.reshape(-1), signed.reshape(-1)))
