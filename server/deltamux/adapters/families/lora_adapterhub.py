"""LoRA and IA3 in AdapterHub's format, which has one config for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.adapterhub_model import (
    AdapterHubConfig,
    ModelNames,
    layers,
    read_adapterhub_config,
    take_layers,
)
from deltamux.adapters.family import Parsed
from deltamux.adapters.fields import as_integer, as_number, refuse_field, unsupported
from deltamux.adapters.keyed_tensors import KeyedTensors
from deltamux.adapters.language_head import take_language_head
from deltamux.adapters.manifest import Manifest
from deltamux.adapters.module_tensors import to_serving
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_scale import OutputScale
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition, InvalidArgument

_ATTENTION = ("q", "k", "v")
_MAX_RANK = 1 << 12
# Before this version of `adapters`, LoRA was trained with another scale than the config says.
_SCALED_AS_TOLD = (1, 1)


class AdapterHubLora:
    """One way to compose: "add" a low rank, or "scale" a module's output with its bias."""

    def __init__(self, name: str, composition: str) -> None:
        self.name = name
        self._composition = composition

    def claims(self, manifest: Manifest) -> bool:
        if (manifest.library, manifest.type) != ("adapterhub", "lora"):
            return False
        config = manifest.fields["config"]
        return isinstance(config, dict) and config.get("composition_mode") == self._composition

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        hub = read_adapterhub_config(manifest.fields, structure)
        config = _read_config(hub, self._composition == "scale")
        keyed = KeyedTensors(tensors, hub.names.model)
        payloads: dict[str, tuple[Payload, ...]] = {}
        for site, key in _sites(config, hub.names, structure):
            payload = _payload(config, site, keyed, f"{key}.loras.{hub.name}", dtype)
            payloads[site.name] = (payload,)
        if not payloads:
            raise InvalidArgument("the config targets no module", reason="NO_TARGETS")
        head, notes = take_language_head(keyed, structure, dtype)
        keyed.require_none_left()
        rank = 0 if config.scales else config.rank
        return Parsed({**payloads, **head}, rank, keyed.taken, notes)


@dataclass(frozen=True)
class _Config:
    """`places` are AdapterHub's names of the modules in a layer."""

    scales: bool
    rank: int
    scaling: float
    places: tuple[str, ...]
    left_out: frozenset[int]


def _read_config(hub: AdapterHubConfig, scales: bool) -> _Config:
    fields = hub.fields
    fields.require_off({"use_gating": False, "use_dora": False, "vera_b": None, "vera_d": None})
    fields.require_off({"dtype": "float32"})
    rank = as_integer("r", fields.take("r"), 1, 1 if scales else _MAX_RANK)
    alpha = as_number("alpha", fields.take("alpha"), 1e6)
    if hub.version not in (None, (0, 0)) and hub.version < _SCALED_AS_TOLD:
        alpha = float(rank)
    attention = fields.take_names("attn_matrices") or ("q", "v")
    for letter in attention:
        if letter not in _ATTENTION:
            refuse_field("attn_matrices", letter, f"of {', '.join(_ATTENTION)}")
    places = attention if fields.take_bool("selfattn_lora", True) else ()
    places += ("intermediate",) if fields.take_bool("intermediate_lora") else ()
    places += ("output",) if fields.take_bool("output_lora") else ()
    config = _Config(scales, rank, alpha if scales else alpha / rank, places, take_layers(fields))
    fields.discard(("architecture", "composition_mode", "dropout", "init_weights"))
    fields.discard(("init_weights_seed",))
    fields.require_none_left()
    return config


def _sites(
    config: _Config, names: ModelNames, structure: Structure
) -> Iterator[tuple[SiteSpec, str]]:
    """The targeted sites, and the names of their modules without the prefix of the model."""
    if not names.linears:
        raise unsupported(f"LoRA of AdapterHub on {structure.model_type!r} models")
    for layer, number in layers(structure).items():
        for place in config.places if number not in config.left_out else ():
            module = f"{layer}.{names.linears[place]}"
            if module not in structure.sites:
                message = f"the base model has no module {module}"
                raise FailedPrecondition(message, reason="BASE_MISMATCH")
            yield structure.sites[module], module.removeprefix(f"{names.model}.")


def _payload(
    config: _Config, site: SiteSpec, tensors: KeyedTensors, key: str, dtype: torch.dtype
) -> LowRank | OutputScale:
    b = tensors.take(f"{key}.lora_B", site.out_features, config.rank) * config.scaling
    if config.scales:
        return OutputScale(to_serving(site, b.flatten(), dtype))
    a = tensors.take(f"{key}.lora_A", config.rank, site.in_features)
    return LowRank(to_serving(site, a, dtype), to_serving(site, b.T, dtype))
