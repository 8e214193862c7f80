"""Decides whether a model can be driven packed and paged, and learns what its layers store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltamux.base.trace import forward_plainly
from deltamux.errors import StartupError

_PROBE_NAME = "deltamux_probe"
_PROBE_TOKENS = 11
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Kinds of rotary embedding whose frequencies follow the longest sequence of the whole batch.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer stores for each token, and how far back it looks."""

    layer_idx: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None


def probe(model: PreTrainedModel, causal: bool = True) -> tuple[AttentionLayer, ...]:
    """The attention layers of a model in order; leaves the model's attention as it was.

    `causal`: every token sees those before it, otherwise all of its sequence.

    Raises StartupError, with the reason, for a model whose layers do not all call the attention
    function with the keys and values of the packed tokens, or that mixes tokens in any other way.
    """
    for reason in _reasons_against(model):
        raise StartupError(
            f"deltamux cannot serve {model.config.model_type!r} models: {reason}",
            reason="MODEL_UNSUPPORTED",
        )
    layers = _record_layers(model, causal)
    expected = model.config.get_text_config().num_hidden_layers
    if [layer.layer_idx for layer in layers] != list(range(expected)):
        raise StartupError(
            f"deltamux cannot serve {model.config.model_type!r} models: {len(layers)} of "
            f"{expected} layers call transformers' AttentionInterface, so that paged attention "
            "would not be used by all of them",
            reason="MODEL_UNSUPPORTED",
        )
    return layers


def _reasons_against(model: PreTrainedModel) -> Iterator[str]:
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        yield "they are encoder-decoders"
    if getattr(model, "_is_stateful", False):
        yield "they keep a recurrent state, which pages of keys and values cannot hold"
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if unknown:
        yield f"layers of type {', '.join(sorted(unknown))} are not implemented"
    rope = set(_rope_types(config)) & _BATCH_DEPENDENT_ROPE
    if rope:
        yield (
            f"their {', '.join(sorted(rope))} rotary embedding depends on the longest sequence "
            "of the batch, so that a request's tokens would depend on its neighbours"
        )


def _rope_types(config: PreTrainedConfig) -> Iterator[str]:
    """Rope types of a config: one, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return
    for candidate in (parameters, *parameters.values()):
        if isinstance(candidate, Mapping) and "rope_type" in candidate:
            yield candidate["rope_type"]


def _record_layers(model: PreTrainedModel, causal: bool) -> tuple[AttentionLayer, ...]:
    layers: dict[int, AttentionLayer] = {}

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        # Without a cache, nobody asks a layer for its number, and some have none.
        index = getattr(module, "layer_idx", None) if causal else len(layers)
        packed = query.shape[2] == key.shape[2] == value.shape[2] == _PROBE_TOKENS
        if isinstance(index, int) and packed and getattr(module, "is_causal", True) == causal:
            layers[index] = AttentionLayer(
                index,
                kv_heads=key.shape[1],
                key_dim=key.shape[3],
                value_dim=value.shape[3],
                window=kwargs.get("sliding_window"),
            )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_PROBE_NAME, record)
    model.set_attn_implementation(_PROBE_NAME)
    try:
        forward_plainly(model, _PROBE_TOKENS)
    finally:
        model.set_attn_implementation(before)
    return tuple(layers[index] for index in sorted(layers))
