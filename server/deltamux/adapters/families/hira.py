"""HiRA in PEFT's format: each number of a weight is scaled by that of a low-rank matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import parse_modules
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import LINEAR_OR_EMBEDDING, read_targets
from deltamux.adapters.primitives.dense import DenseDelta, DenseEmbedding
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec, Structure

_A, _B = "hira_A", "hira_B"
_EMBEDDING_A, _EMBEDDING_B = "hira_embedding_A", "hira_embedding_B"

# How factors were first drawn; the base and the tensors show the others.
_HARMLESS = ("fan_in_fan_out", "hira_dropout", "init_weights", "r", "rank_pattern")


class Hira:
    """Served as the dense change of the weight; an embedding as a table of its own."""

    name = "hira"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "HIRA"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            targets = read_targets(fields)
        parts = (_A, _B, _EMBEDDING_A, _EMBEDDING_B)
        modules = ModuleTensors(tensors, structure, {part: part for part in parts})

        def read(site: SiteSpec) -> list[Payload]:
            weight = structure.host_weight(site.name)
            if site.kind != "embedding":
                return [DenseDelta(weight * _factor(site, modules, (_A, _B)))]
            factor = _factor(site, modules, (_EMBEDDING_A, _EMBEDDING_B))
            # PEFT adds the change to what the embedding gives, behind the base's scale.
            scale = 1.0 if site.embed_scale is None else site.embed_scale
            return [DenseEmbedding(weight * (scale + factor.T))]

        sites = targets.sites(structure, kinds=LINEAR_OR_EMBEDDING)
        return parse_modules(targets, sites, modules, structure, dtype, read)


def _factor(site: SiteSpec, modules: ModuleTensors, parts: tuple[str, str]) -> Tensor:
    """The low-rank matrix [out, in]."""
    a = modules.take(site.name, parts[0], 2).float()
    if a.shape[1] != site.in_features:
        raise other_base(site, f"{parts[0]} of {tuple(a.shape)}")
    return modules.take_shaped(site, parts[1], (site.out_features, a.shape[0])) @ a
