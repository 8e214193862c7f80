"""LN tuning in PEFT's format: norms with a weight and a bias of the adapter's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.norm_tensors import take_norm
from deltamux.adapters.peft.patterns import Selector
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_selector, targeted_sites
from deltamux.base.structure import Kind, Structure

_KINDS: frozenset[Kind] = frozenset(("norm",))

_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


class LnTuning:
    """PEFT copies any module that is named; only copies of norms are served."""

    name = "ln_tuning"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "LN_TUNING"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        selector = _read_selector(manifest.fields)
        modules = ModuleTensors(tensors, structure, Names((_WEIGHT, _BIAS)))
        notes = modules.drop_base_copies()
        payloads = {
            site.name: (take_norm(site, modules, structure, (_WEIGHT, _BIAS), dtype),)
            for site in targeted_sites(selector, structure, _KINDS)
        }
        modules.require_none_left()
        return Parsed(payloads, rank=0, parameters=modules.taken, notes=notes)


def _read_selector(values: Mapping[str, Json]) -> Selector:
    with tuner_fields(values, ()) as fields:
        return read_selector(fields)
