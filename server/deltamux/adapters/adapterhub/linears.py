"""What the methods of AdapterHub that act at linear modules have in common: a config, and names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.adapterhub.keyed_tensors import KeyedTensors
from deltamux.adapters.adapterhub.language_head import take_language_head
from deltamux.adapters.adapterhub.model import (
    AdapterHubConfig,
    layers,
    read_adapterhub_config,
    take_layers,
)
from deltamux.adapters.checkpoint.fields import (
    Fields,
    as_integer,
    as_number,
    refuse_field,
    unsupported,
)
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.rounding import rounded
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition, InvalidArgument

_ATTENTION = ("q", "k", "v")
_MAX_RANK = 1 << 12

# The float32 payloads of a module; its tensors' names begin with the key.
Read = Callable[[SiteSpec, str], tuple[Payload, ...]]


@dataclass(frozen=True, eq=False)
class Given:
    """What the payloads of a module may be made of.

    `fields` are those of the method's own; `scaling` is alpha over rank, and `sites` are the
    targeted ones.
    """

    name: str
    fields: Fields
    rank: int
    scaling: float
    sites: tuple[SiteSpec, ...]
    tensors: KeyedTensors
    structure: Structure

    def factors(self, site: SiteSpec, key: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of a module."""
        a = self.tensors.take(f"{key}.lora_A", self.rank, site.in_features)
        return a, self.tensors.take(f"{key}.lora_B", site.out_features, self.rank)


class LinearMethod(ABC):
    """Reads config and names; its families take a module's tensors."""

    # As the documents of AdapterHub call the method.
    name: str

    def claims(self, manifest: Manifest) -> bool:
        return _method(manifest) == self.name

    @abstractmethod
    def reader(self, given: Given) -> Read:
        """Takes the fields of the method's own, and the tensors that all modules share.

        Raises as `parse` does.
        """

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        hub = read_adapterhub_config(manifest.fields, structure)
        keyed = KeyedTensors(tensors, hub.names.model)
        rank, scaling = _read_scaling(hub, manifest.type)
        sites = dict(_sites(_read_places(hub.fields), hub, structure))
        if not sites:
            raise InvalidArgument("the config targets no module", reason="NO_TARGETS")
        targeted = tuple(structure.sites[name] for name in sites)
        given = Given(hub.name, hub.fields, rank, scaling, targeted, keyed, structure)
        read = self.reader(given)
        _require_read(hub.fields)
        payloads = {
            site.name: tuple(
                rounded(site, payload, dtype)
                for payload in read(site, f"{sites[site.name]}.loras.{hub.name}")
            )
            for site in targeted
        }
        head, notes = take_language_head(keyed, structure, dtype)
        keyed.require_none_left()
        low_ranks = [p for of_site in payloads.values() for p in of_site if isinstance(p, LowRank)]
        rank = max((len(payload.a) for payload in low_ranks), default=0)
        return Parsed({**payloads, **head}, rank, keyed.taken, notes)


def _method(manifest: Manifest) -> Json:
    """The types of AdapterHub, where LoRA's is that of four methods."""
    if manifest.library != "adapterhub" or manifest.type != "lora":
        return manifest.type if manifest.library == "adapterhub" else None
    config = manifest.fields["config"]
    assert isinstance(config, dict)
    match config.get("composition_mode"):
        case "add" if isinstance(config.get("vera_d"), float) or isinstance(
            config.get("vera_b"), float
        ):
            return "vera"
        case "add":
            return "dora" if config.get("use_dora") else "lora"
        case "scale":
            return "ia3"
    return None


def _read_scaling(hub: AdapterHubConfig, architecture: str) -> tuple[int, float]:
    """Rank, and alpha over it."""
    rank = as_integer("r", hub.fields.take("r"), 1, _MAX_RANK)
    alpha = as_number("alpha", hub.fields.take("alpha"), 1e6)
    # AdapterHub corrects no other.
    if hub.misscaled and architecture == "lora":
        alpha = float(rank)
    return rank, alpha / rank


def _read_places(fields: Fields) -> tuple[str, ...]:
    """AdapterHub's names of the modules in a layer."""
    attention = fields.take_names("attn_matrices") or ("q", "v")
    for letter in attention:
        if letter not in _ATTENTION:
            refuse_field("attn_matrices", letter, f"of {', '.join(_ATTENTION)}")
    places = attention if fields.take_bool("selfattn_lora", True) else ()
    places += ("intermediate",) if fields.take_bool("intermediate_lora") else ()
    places += ("output",) if fields.take_bool("output_lora") else ()
    return places


def _require_read(fields: Fields) -> None:
    """What other methods than the reader's own have of this config must be off."""
    fields.require_off({"use_gating": False, "use_dora": False, "vera_b": None, "vera_d": None})
    fields.require_off({"dtype": "float32"})
    fields.discard(("architecture", "composition_mode", "dropout", "init_weights"))
    fields.discard(("init_weights_seed",))
    fields.require_none_left()


def _sites(
    places: tuple[str, ...], hub: AdapterHubConfig, structure: Structure
) -> Iterator[tuple[str, str]]:
    """The targeted sites, and the names of their modules without the prefix of the model."""
    names, left_out = hub.names, take_layers(hub.fields)
    if not names.linears:
        raise unsupported(f"LoRA of AdapterHub on {structure.model_type!r} models")
    for layer, number in layers(structure).items():
        for place in places if number not in left_out else ():
            module = f"{layer}.{names.linears[place]}"
            if module not in structure.sites:
                message = f"the base model has no module {module}"
                raise FailedPrecondition(message, reason="BASE_MISMATCH")
            yield module, module.removeprefix(f"{names.model}.")
