"""PEFT's LoraConfig as far as it is served; any other field is known harmless or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from deltamux.adapters.checkpoint.fields import as_integer, refuse_field, unsupported
from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.peft import weight_tying
from deltamux.adapters.peft.base_shift import Shift, read_shift
from deltamux.adapters.peft.block_diagonal import BlockDiagonal, read_blocks
from deltamux.adapters.peft.patterns import Selector
from deltamux.adapters.peft.per_module import PerModule, read_ranks, read_scales
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_selector
from deltamux.adapters.peft.trained_biases import Trained, read_trained_biases
from deltamux.adapters.peft.trained_tokens import (
    MAX_TOKEN,
    TOKENS_FIELD,
    TrainedTokens,
    read_trained_tokens,
)
from deltamux.base.structure import SiteSpec
from deltamux.errors import InvalidArgument

# Training and how weights were first drawn; fan_in_fan_out says what the base shows. PEFT pools
# the input of modules quantised by GPTQ alone (QALoRA), and this base has none. PEFT before
# 0.3 saved merge_weights, which says when it merges.
HARMLESS = (
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "lora_dropout",
    "lora_ga_config",
    "merge_weights",
    "qalora_group_size",
    "use_qalora",
)

_INVOCATION = "alora_invocation_tokens"

# What each feature that is not served says when it is off.
UNSERVED: Mapping[str, Json] = {
    "arrow_config": None,
    "layer_replication": None,
    "monteclora_config": None,
    "velora_config": None,
}


@dataclass(frozen=True, eq=False)
class LoraConfig:
    """What the config says of the tensors and of the arithmetic."""

    selector: Selector
    ranks: PerModule[int]
    alphas: PerModule[float]
    rank_stabilized: bool
    shift: Shift
    blocks: BlockDiagonal | None
    dora: bool
    bias: bool
    trained_biases: Trained
    trained_tokens: TrainedTokens
    tied: bool
    # The tokens in a prompt that wake the adapter (aLoRA); it is always awake where there are none.
    invocation: tuple[int, ...]
    # Parameters that are adapted by their own names: those of experts.
    parameters: tuple[str, ...]

    def scale_of(self, module: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self.ranks.of(module), self.alphas.of(module)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def shifts(self, site: SiteSpec) -> bool:
        """Whether the init took a part out of the weight; it leaves embeddings alone."""
        return self.shift != "none" and site.kind != "embedding"


def read_lora_config(values: Mapping[str, Json]) -> LoraConfig:
    """Raises InvalidArgument for what is wrong, FailedPrecondition for what is not served."""
    with tuner_fields(values, HARMLESS) as fields:
        fields.require_off(UNSERVED)
        tied = fields.take_bool(weight_tying.FIELD)
        parameters = fields.take_names("target_parameters")
        config = LoraConfig(
            selector=read_selector(fields, may_be_empty=bool(parameters)),
            ranks=read_ranks(fields),
            alphas=read_scales(fields, "lora_alpha"),
            rank_stabilized=fields.take_bool("use_rslora"),
            shift=read_shift(fields),
            blocks=read_blocks(fields),
            dora=fields.take_bool("use_dora"),
            bias=fields.take_bool("lora_bias"),
            trained_biases=read_trained_biases(fields.take("bias"), "lora_only"),
            trained_tokens=read_trained_tokens(fields.take(TOKENS_FIELD), tied),
            tied=tied,
            invocation=_invocation(fields.take(_INVOCATION)),
            parameters=parameters,
        )
    _require_compatible(config)
    return config


def _invocation(value: Json) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        refuse_field(_INVOCATION, value, "a list of token ids")
    return tuple(as_integer(_INVOCATION, token, 0, MAX_TOKEN) for token in value)


def _require_compatible(config: LoraConfig) -> None:
    """PEFT makes no adapter of more than one of these."""
    if config.dora and config.bias:
        raise InvalidArgument(f"{CONFIG}: lora_bias and use_dora exclude each other")
    if config.blocks is not None and (config.dora or config.bias or config.shift != "none"):
        raise unsupported("use_bdlora beside another variant of LoRA")
    if config.shift == "kasa" and config.dora:
        raise unsupported("kasa_config beside use_dora")
    if config.parameters and (config.bias or config.invocation or config.dora):
        raise unsupported("target_parameters beside another variant of LoRA")
    if config.parameters and (config.blocks is not None or config.shift != "none"):
        raise unsupported("target_parameters beside another variant of LoRA")
    always_awake = config.trained_biases != "none" or config.trained_tokens.by_module
    variant = config.dora or config.blocks is not None or config.shift != "none"
    if config.invocation and (variant or always_awake):
        raise unsupported(f"{_INVOCATION} beside another variant, trained biases or tokens")
