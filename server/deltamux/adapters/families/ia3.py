"""IA3 in PEFT's format: a scale of the output, or of the input of feed-forward modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.patterns import Pattern, Selector
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import LINEAR, read_selector, targeted_sites
from deltamux.adapters.primitives.input_scale import InputScale
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_scale import OutputScale
from deltamux.base.structure import SiteSpec, Structure

# How vectors were first drawn; fan_in_fan_out says what the base shows.
_HARMLESS = ("fan_in_fan_out", "init_ia3_weights")


class Ia3:
    """The output is scaled with its bias; a feed-forward module's input is scaled instead."""

    name = "ia3"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "IA3"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        config = _read_config(manifest.fields)
        modules = ModuleTensors(tensors, structure, {"ia3_l": "ia3_l"})
        notes = modules.drop_base_copies()
        payloads = {
            site.name: (_payload(site, modules, config.is_feedforward(site.name), dtype),)
            for site in targeted_sites(config.selector, structure, LINEAR)
        }
        modules.require_none_left()
        return Parsed(payloads, rank=0, parameters=modules.taken, notes=notes)


@dataclass(frozen=True, eq=False)
class _Config:
    selector: Selector
    feedforward: Pattern | tuple[str, ...]

    def is_feedforward(self, module: str) -> bool:
        """As PEFT decides it: a name in the list may begin in the middle of a word."""
        if isinstance(self.feedforward, Pattern):
            return self.feedforward.matches(module)
        return module.endswith(self.feedforward)


def _read_config(values: Mapping[str, Json]) -> _Config:
    with tuner_fields(values, _HARMLESS) as fields:
        return _Config(read_selector(fields), _feedforward(fields.take("feedforward_modules")))


def _feedforward(value: Json) -> Pattern | tuple[str, ...]:
    if value is None:
        refuse_field("feedforward_modules", value, "given: a pattern or a list of modules")
    if isinstance(value, str):
        return Pattern(value)
    return Fields({"feedforward_modules": value}).take_names("feedforward_modules")


def _payload(
    site: SiteSpec, modules: ModuleTensors, feedforward: bool, dtype: torch.dtype
) -> Payload:
    vector = modules.take(site.name, "ia3_l", 2)
    shape = (1, site.in_features) if feedforward else (site.out_features, 1)
    if vector.shape != shape:
        raise other_base(site, f"ia3_l of {tuple(vector.shape)}")
    scale = to_serving(site, vector.flatten(), dtype)
    return InputScale(scale) if feedforward else OutputScale(scale)
