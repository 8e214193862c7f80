"""LoReFT in AdapterHub's format: a subspace of the hidden states of a prompt's first tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.adapterhub.keyed_tensors import KeyedTensors
from deltamux.adapters.adapterhub.language_head import take_language_head
from deltamux.adapters.adapterhub.layer_ends import layer_ends
from deltamux.adapters.adapterhub.model import AdapterHubConfig, read_adapterhub_config
from deltamux.adapters.checkpoint.fields import Fields, as_integer, refuse_field, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.primitives.bottleneck import SumBottleneck
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import InvalidArgument

_MAX_COUNT = 1 << 16

_HARMLESS = ("architecture", "dropout", "init_weights_seed")


class LoReft:
    """h + R^T (W h + b - R h) behind a layer: a bottleneck that reads what the layer goes on with.

    A file of NoReFT reads as one of DiReFT does, so that without orthogonality there is no telling
    whether R h is subtracted.
    """

    name = "reft"

    def claims(self, manifest: Manifest) -> bool:
        return (manifest.library, manifest.type) == ("adapterhub", "reft")

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        hub = read_adapterhub_config(manifest.fields, structure)
        config = _read_config(hub.fields)
        keyed = KeyedTensors(tensors, hub.names.model)
        payloads = {
            site.name: (_payload(config, site, keyed, key, dtype),)
            for site, key in _ends(config, hub, structure)
        }
        if not payloads:
            raise InvalidArgument("the config names no layer of the base", reason="NO_TARGETS")
        head, notes = take_language_head(keyed, structure, dtype)
        if head:
            raise unsupported("a trained language head beside ReFT, which acts on first tokens,")
        keyed.require_none_left()
        notes = (f"acts on the first {config.reach} tokens", *notes)
        return Parsed(payloads, config.rank, keyed.taken, notes, reach=config.reach)


@dataclass(frozen=True)
class _Config:
    """`layers` is None for all; `units` are those in the file, the first of which is served."""

    rank: int
    reach: int
    layers: frozenset[int] | None
    units: int


def _read_config(fields: Fields) -> _Config:
    fields.require_off({"suffix_positions": 0, "non_linearity": None, "dtype": "float32"})
    if not fields.take_bool("output_reft", True):
        raise unsupported("output_reft = false, which leaves ReFT out,")
    if not fields.take_bool("orthogonality"):
        raise unsupported("orthogonality = false (NoReFT or DiReFT, the file does not tell which)")
    config = _Config(
        rank=as_integer("r", fields.take("r"), 1, _MAX_COUNT),
        reach=as_integer("prefix_positions", fields.take("prefix_positions"), 1, _MAX_COUNT),
        layers=_layers(fields),
        units=1 if fields.take_bool("tied_weights") else 2,
    )
    fields.discard(_HARMLESS)
    fields.require_none_left()
    return config


def _layers(fields: Fields) -> frozenset[int] | None:
    value = fields.take("layers")
    if value == "all":
        return None
    if not isinstance(value, list):
        refuse_field("layers", value, '"all" or a list of layers')
    return frozenset(as_integer("layers", layer, 0, _MAX_COUNT) for layer in value)


def _ends(
    config: _Config, hub: AdapterHubConfig, structure: Structure
) -> Iterator[tuple[SiteSpec, str]]:
    """Where the layers end, and the names of what stands behind them."""
    for layer in layer_ends(structure, hub.names):
        if layer.norms_last:
            raise unsupported("ReFT behind layers that norm last")
        if config.layers is None or layer.number in config.layers:
            yield layer.sites[1], f"{layer.name}.reft_layer.refts.{hub.name}"


def _payload(
    config: _Config, site: SiteSpec, tensors: KeyedTensors, key: str, dtype: torch.dtype
) -> SumBottleneck:
    units = [_unit(config, site, tensors, f"{key}.units.{unit}") for unit in range(config.units)]
    # The second unit is for the last tokens of a prompt, of which there are none.
    weight, bias, projection = units[0]
    up = torch.cat((projection, projection.new_zeros(1, site.out_features)))
    return SumBottleneck(
        to_serving(site, weight - projection, dtype),
        to_serving(site, bias, dtype),
        "linear",
        to_serving(site, up, dtype),
    )


def _unit(
    config: _Config, site: SiteSpec, tensors: KeyedTensors, key: str
) -> tuple[Tensor, Tensor, Tensor]:
    """W [r, hidden], b [r] and R [r, hidden]."""
    rank, hidden = config.rank, site.out_features
    rotation = f"{key}.projection.parametrizations.weight"
    return (
        tensors.take(f"{key}.learned_source.weight", rank, hidden),
        tensors.take(f"{key}.learned_source.bias", rank),
        _orthogonal(
            tensors.take(f"{rotation}.original", rank, hidden),
            tensors.take(f"{rotation}.0.base", hidden, hidden),
        ),
    )


def _orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """The rows that torch makes of its orthogonal parametrisation: Householder's reflections.

    Its diagonal holds their signs, 1 or -1.
    """
    tall = original.T
    below = tall.tril(diagonal=-1)
    scales = 2.0 / (1.0 + below.square().sum(dim=0))
    rows = torch.linalg.householder_product(below, scales) * tall.diagonal().int()
    rotated: Tensor = (base @ rows).T
    return rotated
