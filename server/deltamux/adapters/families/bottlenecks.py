"""Bottleneck adapters in AdapterHub's format: Houlsby, Pfeiffer, parallel, Compacter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deltamux.adapters.adapterhub.bottleneck_config import BottleneckConfig, read_bottleneck_config
from deltamux.adapters.adapterhub.keyed_tensors import KeyedTensors
from deltamux.adapters.adapterhub.language_head import take_language_head
from deltamux.adapters.adapterhub.layer_ends import LayerEnds, layer_ends
from deltamux.adapters.adapterhub.model import read_adapterhub_config
from deltamux.adapters.adapterhub.phm import PhmWeights, Position
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.primitives.bottleneck import Bottleneck
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import InvalidArgument


class Bottlenecks:
    """A small network of two layers at the end of attention, of the MLP, or of both."""

    name = "bottleneck"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.library == "adapterhub" and manifest.type == "bottleneck"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        hub = read_adapterhub_config(manifest.fields, structure)
        config = read_bottleneck_config(hub)
        keyed = KeyedTensors(tensors, hub.names.model)
        reader = _Reader(hub.name, config, keyed, dtype)
        payloads = {
            site.name: (reader.payload(layer, site, f"{end}.adapters.{hub.name}"),)
            for layer in layer_ends(structure, hub.names)
            for site, end in _ends(config, layer)
        }
        if not payloads:
            raise InvalidArgument("the config puts no adapter anywhere", reason="NO_TARGETS")
        head, notes = take_language_head(keyed, structure, dtype)
        keyed.require_none_left()
        width = max(payload.down.shape[0] for (payload,) in payloads.values())
        return Parsed({**payloads, **head}, rank=width, parameters=keyed.taken, notes=notes)


def _ends(config: BottleneckConfig, layer: LayerEnds) -> Iterator[tuple[SiteSpec, str]]:
    """Where in this layer the config puts an adapter."""
    if layer.number in config.left_out:
        return
    attention, mlp = layer.sites
    if config.attention:
        yield attention, layer.attention
    if config.mlp:
        yield mlp, layer.mlp


class _Reader:
    """Takes the tensors of one adapter, end by end."""

    def __init__(
        self, name: str, config: BottleneckConfig, tensors: KeyedTensors, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._dtype = dtype
        shared = f"shared_parameters.{name}"
        self._phm = None if config.phm is None else PhmWeights(config.phm, tensors, shared)

    def payload(self, layer: LayerEnds, site: SiteSpec, key: str) -> Bottleneck:
        config, hidden = self._config, site.out_features
        width = config.width(layer.number, hidden)
        # A norm before takes the first place in the sequence.
        first = f"{key}.adapter_down.{int(config.ln_before)}"
        down, bias = self._linear(first, "down", hidden, width)
        up, last_bias = self._linear(f"{key}.adapter_up", "up", width, hidden)
        up = torch.cat((up.T, last_bias[None])) * self._scaling(key, hidden)
        return config.reads(layer.norms_last)(
            to_serving(site, down, self._dtype),
            to_serving(site, bias, self._dtype),
            config.activation,
            to_serving(site, up, self._dtype),
            self._norm_before(site, key),
            self._norm(site, f"{key}.adapter_norm_after") if config.ln_after else None,
        )

    def _linear(
        self, key: str, position: Position, fan_in: int, fan_out: int
    ) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias [out]."""
        if self._phm is not None:
            weight = self._phm.matrix(key, position, fan_in, fan_out)
            return weight, self._phm.bias(key, fan_out)
        weight = self._tensors.take(f"{key}.weight", fan_out, fan_in)
        return weight, self._tensors.take(f"{key}.bias", fan_out)

    def _scaling(self, key: str, hidden: int) -> Tensor | float:
        scaling = self._config.scaling
        if isinstance(scaling, float):
            return scaling
        return self._tensors.take(f"{key}.scaling", 1 if scaling == "learned" else hidden)

    def _norm_before(self, site: SiteSpec, key: str) -> Tensor | None:
        """AdapterHub saves it twice, once as the first of the sequence."""
        if not self._config.ln_before:
            return None
        norm = self._norm(site, f"{key}.adapter_norm_before")
        if not torch.equal(norm, self._norm(site, f"{key}.adapter_down.0")):
            raise InvalidArgument(
                f"{key}.adapter_norm_before and adapter_down.0 are one norm, but differ",
                reason="MALFORMED_WEIGHTS",
            )
        return norm

    def _norm(self, site: SiteSpec, key: str) -> Tensor:
        """Weight and bias, [2, hidden]."""
        vectors = [
            self._tensors.take(f"{key}.{part}", site.out_features) for part in ("weight", "bias")
        ]
        return to_serving(site, torch.stack(vectors), self._dtype)
