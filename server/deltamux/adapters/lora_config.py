"""PEFT's LoraConfig as far as it is served; any other field is known harmless or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from deltamux.adapters import weight_tying
from deltamux.adapters.fields import Fields, as_integer, as_number, unsupported
from deltamux.adapters.files import CONFIG
from deltamux.adapters.patterns import PatternTable, Selector
from deltamux.adapters.shared_fields import PROVENANCE, refuse_executable, require_generation
from deltamux.adapters.strict_json import Json, quoted
from deltamux.adapters.targets import read_selector
from deltamux.adapters.trained_biases import Trained, read_trained_biases
from deltamux.adapters.trained_tokens import TOKENS_FIELD, TrainedTokens, read_trained_tokens
from deltamux.errors import FailedPrecondition, InvalidArgument

Number = TypeVar("Number", int, float)

MAX_RANK = 4096

_MAX_CONFIG_RANK = (1 << 31) - 1
_MAX_ALPHA = 1e6
# Initialisations after which the base weights are the base's own.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

# Training and how weights were first drawn; fan_in_fan_out says what the base shows.
_HARMLESS = (
    *PROVENANCE,
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "lora_dropout",
    "lora_ga_config",
    "qalora_group_size",
)

# What each feature that is not served says when it is off.
_UNSERVED: Mapping[str, Json] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": None,
    "monteclora_config": None,
    "target_parameters": None,
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
    trained_biases: Trained
    trained_tokens: TrainedTokens
    tied: bool

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self.rank_of(module), self.alphas.get(module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def read_lora_config(values: Mapping[str, Json]) -> LoraConfig:
    """Raises InvalidArgument for what is wrong, FailedPrecondition for what is not served."""
    fields = Fields(values)
    refuse_executable(fields)
    fields.require_off(_UNSERVED)
    _require_plain_init(fields.take("init_lora_weights"))
    require_generation(fields)
    tied = fields.take_bool(weight_tying.FIELD)
    config = LoraConfig(
        selector=read_selector(fields),
        ranks=PatternTable(_values(fields, "rank_pattern", _rank)),
        alphas=PatternTable(_values(fields, "alpha_pattern", _alpha)),
        rank=_rank("r", fields.take("r")),
        alpha=_alpha("lora_alpha", fields.take("lora_alpha")),
        rank_stabilized=fields.take_bool("use_rslora"),
        dora=fields.take_bool("use_dora"),
        bias=fields.take_bool("lora_bias"),
        trained_biases=read_trained_biases(fields.take("bias"), "lora_only"),
        trained_tokens=read_trained_tokens(fields.take(TOKENS_FIELD), tied),
        tied=tied,
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


def _require_plain_init(init: Json) -> None:
    if init is None or isinstance(init, bool):
        return
    if not isinstance(init, str) or init.lower() not in _PLAIN_INITS:
        raise unsupported(f"init_lora_weights = {quoted(init)} (it may shift the base weights)")
