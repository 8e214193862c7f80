"""Prefix tuning in AdapterHub's format: keys and values through a network, or as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deltamux.adapters.adapterhub.keyed_tensors import KeyedTensors
from deltamux.adapters.adapterhub.language_head import take_language_head
from deltamux.adapters.adapterhub.model import (
    ModelNames,
    layers,
    read_adapterhub_config,
    take_layers,
    take_text,
)
from deltamux.adapters.checkpoint.fields import Fields, as_integer, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.peft.prompt_tensors import prefix_site
from deltamux.adapters.primitives.virtual_tokens import KeyValuePrefix
from deltamux.base.structure import Structure

_MAX_SIZE = 1 << 20
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}

# What only training does, and what only decoders beside an encoder have.
_HARMLESS = (
    "architecture",
    "cross_prefix",
    "dropout",
    "encoder_prefix",
    "init_weights_seed",
    "shared_gating",
)


class AdapterHubPrefixTuning:
    """Unlike PEFT's, the prefix takes no positions, and every token sees it from however far."""

    name = "prefix_tuning"

    def claims(self, manifest: Manifest) -> bool:
        return (manifest.library, manifest.type) == ("adapterhub", "prefix_tuning")

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        hub = read_adapterhub_config(manifest.fields, structure)
        _require_base(structure)
        site, width = prefix_site(structure)
        keyed = KeyedTensors(tensors, hub.names.model)
        _drop_copies(keyed, hub.names, structure)
        read = _reader(hub.fields, f"prefix_tuning.prefix_tunings.{hub.name}.self_prefix")
        count = len(structure.layers)
        states = read(keyed, structure.task_heads.width, count * 2 * width)
        states = states.view(-1, count, 2, width).permute(1, 2, 0, 3)
        parameters = keyed.taken
        head, notes = take_language_head(keyed, structure, dtype)
        keyed.require_none_left()
        prefix = KeyValuePrefix(to_serving(site, states, dtype), counted=False)
        notes = (f"{states.shape[2]} virtual tokens", *notes)
        return Parsed({site.name: (prefix,), **head}, 0, parameters, notes)


def _require_base(structure: Structure) -> None:
    if not structure.head:
        raise unsupported("a prefix before what an encoder reads")
    if any(layer.window is not None for layer in structure.layers):
        raise unsupported("a prefix that stays in sight, in layers that look back a window,")


def _drop_copies(tensors: KeyedTensors, names: ModelNames, structure: Structure) -> None:
    """AdapterHub saves the prefix of the model once more with each layer."""
    for layer in layers(structure):
        attention = f"{layer.removeprefix(f'{names.model}.')}.{names.self_attention}"
        tensors.drop_copies(f"{attention}.prefix_tuning.pool", "prefix_tuning")


# Tensors, the width of the base, numbers of a token in all layers -> [tokens, numbers].
_Read = Callable[[KeyedTensors, int, int], Tensor]


def _reader(fields: Fields, key: str) -> _Read:
    tokens = _size(fields, "prefix_length")
    bottleneck = _size(fields, "bottleneck_size")
    activation = take_text(fields, "non_linearity").lower()
    flat = fields.take_bool("flat")
    if not flat and activation not in _ACTIVATIONS:
        raise unsupported(f"non_linearity = {quoted(activation)}")
    if take_layers(fields):
        raise unsupported("a prefix that leaves out layers")
    fields.require_off({"use_gating": False})
    fields.discard(_HARMLESS)
    fields.require_none_left()

    def read(tensors: KeyedTensors, hidden: int, numbers: int) -> Tensor:
        if flat:
            return tensors.take(f"{key}.control_trans", tokens * numbers).view(tokens, numbers)
        rows = tensors.take(f"{key}.wte.weight", tokens, hidden)
        down, down_bias = _linear(tensors, f"{key}.control_trans.0", hidden, bottleneck)
        up, up_bias = _linear(tensors, f"{key}.control_trans.2", bottleneck, numbers)
        return _ACTIVATIONS[activation](rows @ down.T + down_bias) @ up.T + up_bias

    return read


def _size(fields: Fields, name: str) -> int:
    return as_integer(name, fields.take(name), 1, _MAX_SIZE)


def _linear(tensors: KeyedTensors, key: str, fan_in: int, fan_out: int) -> tuple[Tensor, Tensor]:
    return tensors.take(f"{key}.weight", fan_out, fan_in), tensors.take(f"{key}.bias", fan_out)
