"""PEFT's LoraConfig as far as it is served; any other field is known harmless or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from deltamux.adapters.fields import Fields, as_integer, as_number, refuse_field, unsupported
from deltamux.adapters.files import CONFIG
from deltamux.adapters.patterns import ALL_LINEAR, LayerFilter, Pattern, PatternTable, Selector
from deltamux.adapters.strict_json import Json, quoted
from deltamux.errors import FailedPrecondition, InvalidArgument

Number = TypeVar("Number", int, float)

MAX_RANK = 4096

_MAX_CONFIG_RANK = (1 << 31) - 1
_MAX_ALPHA = 1e6
_MAX_LAYER = 1 << 16

# Initialisations after which the base weights are the base's own.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

# Training, provenance and how weights were first drawn; fan_in_fan_out says what the base shows.
_HARMLESS = (
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "lora_ga_config",
    "peft_version",
    "qalora_group_size",
    "revision",
)

# What each feature that is not served says when it is off.
_UNSERVED: Mapping[str, Json] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "ensure_weight_tying": False,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": None,
    "modules_to_save": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}


@dataclass(frozen=True, eq=False)
class LoraConfig:
    """What the config says of the tensors and of the arithmetic."""

    selector: Selector
    ranks: PatternTable[int]
    alphas: PatternTable[float]
    rank: int
    alpha: float
    rank_stabilized: bool
    dora: bool
    bias: bool

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self.rank_of(module), self.alphas.get(module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def read_lora_config(values: Mapping[str, Json]) -> LoraConfig:
    """Raises InvalidArgument for what is wrong, FailedPrecondition for what is not served."""
    fields = Fields(values)
    _refuse_executable(fields)
    fields.require_off(_UNSERVED)
    _require_plain_init(fields.take("init_lora_weights"))
    _require_generation(fields.take("task_type"))
    config = LoraConfig(
        selector=_selector(fields),
        ranks=PatternTable(_values(fields, "rank_pattern", _rank)),
        alphas=PatternTable(_values(fields, "alpha_pattern", _alpha)),
        rank=_rank("r", fields.take("r")),
        alpha=_alpha("lora_alpha", fields.take("lora_alpha")),
        rank_stabilized=fields.take_bool("use_rslora"),
        dora=fields.take_bool("use_dora"),
        bias=fields.take_bool("lora_bias"),
    )
    fields.discard(_HARMLESS)
    fields.require_none_left()
    if config.dora and config.bias:
        raise InvalidArgument(f"{CONFIG}: lora_bias and use_dora exclude each other")
    return config


def _rank(name: str, value: Json) -> int:
    rank = as_integer(name, value, 1, _MAX_CONFIG_RANK)
    if rank > MAX_RANK:
        raise FailedPrecondition(
            f"{CONFIG}: {name} is {rank}; this server serves ranks up to {MAX_RANK}",
            reason="RANK_TOO_LARGE",
            metadata={"max_rank": str(MAX_RANK)},
        )
    return rank


def _alpha(name: str, value: Json) -> float:
    return as_number(name, value, _MAX_ALPHA)


def _values(fields: Fields, name: str, read: Callable[[str, Json], Number]) -> Mapping[str, Number]:
    return {
        key: read(f"{name}[{quoted(key)}]", value) for key, value in fields.take_table(name).items()
    }


def _selector(fields: Fields) -> Selector:
    targets, excluded = fields.take("target_modules"), fields.take("exclude_modules")
    layers, patterns = (
        _layers(fields.take("layers_to_transform")),
        fields.take_names("layers_pattern"),
    )
    if isinstance(targets, str) and (layers or patterns):
        refuse_field("target_modules", targets, "a list where layers_to_transform is set")
    if patterns and not layers:
        refuse_field("layers_pattern", list(patterns), "missing where layers_to_transform is")
    if not targets:
        raise InvalidArgument(f"{CONFIG}: target_modules is empty", reason="NO_TARGETS")
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    return Selector(
        targets=None if all_linear else _rule("target_modules", targets),
        excluded=_rule("exclude_modules", excluded),
        layers=LayerFilter(layers, patterns) if layers else None,
    )


def _rule(name: str, value: Json) -> tuple[str, ...] | Pattern:
    if isinstance(value, str) and value:
        return Pattern(value)
    return Fields({name: value}).take_names(name)


def _layers(value: Json) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(as_integer("layers_to_transform", v, 0, _MAX_LAYER) for v in values)


def _refuse_executable(fields: Fields) -> None:
    """Fields that name code to import, which never happens here."""
    mapping = fields.take("auto_mapping")
    names_transformers = isinstance(mapping, dict) and str(
        mapping.get("parent_library", "")
    ).startswith("transformers.models.")
    # PEFT writes the base's own class where no task was given; only that is harmless.
    suspects = {
        "auto_mapping": None if names_transformers else mapping,
        "megatron_config": fields.take("megatron_config"),
        "megatron_core": fields.take("megatron_core"),
        "trust_remote_code": fields.take("trust_remote_code"),
    }
    for name, value in suspects.items():
        if value not in (None, False, "megatron.core"):
            raise InvalidArgument(
                f"{CONFIG}: {name} names code to run and is refused",
                reason="EXECUTABLE_FIELD",
                field=name,
            )


def _require_plain_init(init: Json) -> None:
    if init is None or isinstance(init, bool):
        return
    if not isinstance(init, str) or init.lower() not in _PLAIN_INITS:
        raise unsupported(f"init_lora_weights = {quoted(init)} (it may shift the base weights)")


def _require_generation(task: Json) -> None:
    if task not in (None, "CAUSAL_LM"):
        raise unsupported(f"task_type = {quoted(task)}")
