"""What every AdapterHub config says of adapter and model, and AdapterHub's names of its places."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.version import InvalidVersion, Version

from deltamux.adapters.checkpoint.fields import Fields, as_integer, refuse_field, unsupported
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.base.structure import Structure
from deltamux.errors import FailedPrecondition

# Where the adapter comes from.
_PROVENANCE = ("config_id", "model_name", "type")
# How versions of `adapters` begin, and the first whose LoRA was trained as its config says.
_ADAPTERS, _SCALED_AS_TOLD = "adapters.", Version("1.1.0")

_LLAMA = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    # Not what the words say: these are the modules that AdapterHub wraps.
    "intermediate": "mlp.down_proj",
    "output": "mlp.up_proj",
}
_BERT = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


@dataclass(frozen=True)
class ModelNames:
    """Of the model inside one with a head; in a layer, of what follows attention and MLP, of the
    linear modules that take LoRA there, and of the attention that takes a prefix."""

    model: str
    attention: str = "attention_adapters"
    mlp: str = "output_adapters"
    linears: Mapping[str, str] = field(default_factory=dict)
    self_attention: str = "self_attn"


_MODELS = {
    "llama": ModelNames("model", linears=_LLAMA),
    "mistral": ModelNames("model", linears=_LLAMA),
    # Its one module for query, key and value takes LoRA in a form of its own.
    "gpt2": ModelNames("transformer", self_attention="attn"),
    "bert": ModelNames("bert", "attention.output", "output", _BERT, "attention.self"),
    "roberta": ModelNames("roberta", "attention.output", "output", _BERT, "attention.self"),
}


@dataclass(frozen=True, eq=False)
class AdapterHubConfig:
    """`name` stands in every tensor's name; `fields` are those of the method, unread.

    `versioned` is false where the config is older than versions, `misscaled` where LoRA was trained
    with another scale than it says.
    """

    name: str
    versioned: bool
    misscaled: bool
    names: ModelNames
    fields: Fields


def read_adapterhub_config(values: Mapping[str, Json], structure: Structure) -> AdapterHubConfig:
    """Raises InvalidArgument or FailedPrecondition for what is not understood, or another base."""
    outer = Fields(values)
    _require_no_head(outer.take("model_class"))
    version = outer.take("version")
    config = AdapterHubConfig(
        name=take_text(outer, "name"),
        versioned=version is not None,
        misscaled=_precedes_scale(version),
        names=_names(take_text(outer, "model_type"), structure),
        fields=Fields(outer.take_table("config")),
    )
    _require_width(outer.take("hidden_size"), structure)
    outer.discard(_PROVENANCE)
    outer.require_none_left()
    return config


def model_prefix(structure: Structure) -> str:
    """What names of tensors begin with where the model has a head. Raises as `parse` does."""
    return _names(structure.model_type, structure).model


def layers(structure: Structure) -> dict[str, int]:
    """The number of each layer of the base by its name, in order."""
    matches = (re.match(r"(.*?\.(\d+))\.", site) for site in structure.sites)
    return {match[1]: int(match[2]) for match in matches if match}


def take_text(fields: Fields, name: str) -> str:
    value = fields.take(name)
    return value if isinstance(value, str) and value else refuse_field(name, value, "a name")


def take_layers(fields: Fields) -> frozenset[int]:
    """The layers that `leave_out` names."""
    value = fields.take("leave_out")
    if value is None:
        return frozenset()
    if not isinstance(value, list):
        refuse_field("leave_out", value, "a list of layers")
    return frozenset(as_integer("leave_out", layer, 0, 1 << 16) for layer in value)


def _require_no_head(model_class: Json) -> None:
    """A model for another task answers through a head, which is not in this file."""
    if isinstance(model_class, str) and "For" in model_class.removesuffix("ForCausalLM"):
        raise unsupported(f"model_class = {quoted(model_class)}")


def _precedes_scale(version: Json) -> bool:
    """Other libraries, whose versions begin otherwise, had it right."""
    if version is None:
        return False
    if not isinstance(version, str):
        refuse_field("version", version, "a text")
    if not version.startswith(_ADAPTERS):
        return False
    try:
        return Version(version.removeprefix(_ADAPTERS)) < _SCALED_AS_TOLD
    except InvalidVersion:
        refuse_field("version", version, "a version")


def _names(model_type: str, structure: Structure) -> ModelNames:
    if model_type != structure.model_type:
        raise FailedPrecondition(
            f"the adapter was trained on a {quoted(model_type)} model, "
            f"this base is {structure.model_type!r}",
            reason="BASE_MISMATCH",
        )
    if model_type not in _MODELS:
        raise FailedPrecondition(
            f"adapters of AdapterHub are not served on {model_type!r} models",
            reason="UNSUPPORTED_FEATURE",
        )
    return _MODELS[model_type]


def _require_width(value: Json, structure: Structure) -> None:
    width = structure.task_heads.width
    if value is not None and as_integer("hidden_size", value, 1, 1 << 20) != width:
        raise FailedPrecondition(
            f"the adapter is for hidden_size {value}, this base has {width}",
            reason="BASE_MISMATCH",
        )
