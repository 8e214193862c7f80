"""BEFT in PEFT's format: a bias is added to the output of a module, whether it had one or not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.peft.module_family import parse_modules
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.base.structure import SiteSpec, Structure

_BIAS = "beft_bias"


class Beft:
    """What is saved is added, not put in the place of the base's bias."""

    name = "beft"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "BEFT"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        with tuner_fields(manifest.fields, ("init_weights",)) as fields:
            targets = read_targets(fields)
        modules = ModuleTensors(tensors, structure, {_BIAS: _BIAS})

        def read(site: SiteSpec) -> list[Payload]:
            bias = modules.take_shaped(site, _BIAS, (1, site.out_features))
            return [RowBias(bias.flatten())]

        sites = targets.sites(structure)
        return parse_modules(targets, sites, modules, structure, dtype, read)
