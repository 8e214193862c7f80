"""Encoders: models whose tokens all see each other, so that they generate nothing.

They are loaded as classifiers, for the names that their modules have there, and driven without the
classifier itself, which each adapter brings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from deltamux.base.task_heads import HeadFormat, HeadModule, Level, Pooling
from deltamux.base.trace import is_linear, is_norm

# Rows [n, width] to as many.
RowFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Encoder:
    """What transformers does for one type of encoder, beside its layers."""

    formats: Callable[[PreTrainedConfig], Mapping[Level, HeadFormat]]
    # The base's own part of its heads; checkpoints may lack it.
    shared: str = ""
    # Positions count from behind the padding's id, and padding does not count.
    skips_padding: bool = False


def encoder_of(config: PreTrainedConfig) -> Encoder | None:
    """None for a model that is not driven as an encoder."""
    return None if getattr(config, "is_decoder", False) else _ENCODERS.get(config.model_type)


def heads_of(model: PreTrainedModel, names: Collection[str]) -> frozenset[str]:
    """Those parameters of an encoder that are no part of its body, or the base's part of a head."""
    encoder = encoder_of(model.config)
    if encoder is None:
        return frozenset()
    body, shared = f"{model.base_model_prefix}.", f"{encoder.shared}."
    return frozenset(n for n in names if not n.startswith(body) or n.startswith(shared))


def set_shared_apart(model: PreTrainedModel, missing: frozenset[str]) -> None:
    """Keeps the body of an encoder from running the base's part of its heads.

    That part is dropped where the checkpoint lacks it: `missing` names parameters.
    """
    encoder = encoder_of(model.config)
    if encoder is None or not encoder.shared:
        return
    parent, _, name = encoder.shared.rpartition(".")
    shared = model.get_submodule(encoder.shared)
    lacks = any(parameter.startswith(f"{encoder.shared}.") for parameter in missing)
    inside = _Pooler(shared) if parent else shared
    setattr(model.get_submodule(parent), name, None if lacks else inside)


def shared_head(model: PreTrainedModel) -> RowFunction | None:
    """The base's own part of its heads, where it has one."""
    encoder = encoder_of(model.config)
    if encoder is None or not encoder.shared:
        return None
    parent, _, name = encoder.shared.rpartition(".")
    shared = getattr(model.get_submodule(parent), name)
    return shared.pool if isinstance(shared, _Pooler) else shared


def shared_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear modules and norms in the base's own part of its heads, by name."""
    if shared_head(model) is None:
        return {}
    encoder = encoder_of(model.config)
    assert encoder is not None
    part = model.get_submodule(encoder.shared)
    return {
        f"{encoder.shared}.{name}": module
        for name, module in part.named_children()
        if is_linear(module) or is_norm(module)
    }


def padded_positions(token_ids: Tensor, starts: Tensor, padding: int) -> Tensor:
    """Positions [T] of packed `token_ids` [T], for sequences that begin at `starts` [B + 1], the
    last of which is T. Waits for nothing.

    p(t) = padding + the number of tokens up to t that are no padding; padding itself has `padding`.
    """
    counts = token_ids != padding
    upto = counts.cumsum(0)
    before = (upto - counts.long())[starts[:-1]]
    lengths = starts.diff()
    return (upto - before.repeat_interleave(lengths, output_size=len(token_ids))) * counts + padding


class _Pooler(nn.Module):
    """BERT's pooler, which runs on the rows of those who want it instead of inside the body."""

    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.dense = pooler.get_submodule("dense")
        self.activation = pooler.get_submodule("activation")

    def forward(self, hidden: Tensor) -> None:
        """What the body calls: nothing is pooled there."""

    def pool(self, rows: Tensor) -> Tensor:
        pooled: Tensor = self.activation(self.dense(rows))
        return pooled


def _linear(name: str) -> tuple[HeadModule, ...]:
    return (HeadModule((name,), biased=True),)


def _bert(config: PreTrainedConfig) -> Mapping[Level, HeadFormat]:
    return {
        "sequence": HeadFormat("first", _linear("classifier"), shared=True),
        "token": HeadFormat("all", _linear("classifier")),
    }


def _roberta(config: PreTrainedConfig) -> Mapping[Level, HeadFormat]:
    dense = HeadModule(("classifier.dense",), biased=True, activation="tanh")
    return {
        "sequence": HeadFormat("first", (dense, *_linear("classifier.out_proj"))),
        "token": HeadFormat("all", _linear("classifier")),
    }


def _distilbert(config: PreTrainedConfig) -> Mapping[Level, HeadFormat]:
    dense = HeadModule(("pre_classifier",), biased=True, activation="relu")
    return {
        "sequence": HeadFormat("first", (dense, *_linear("classifier"))),
        "token": HeadFormat("all", _linear("classifier")),
    }


def _modernbert(config: PreTrainedConfig) -> Mapping[Level, HeadFormat]:
    pooling: Pooling = "first" if config.classifier_pooling == "cls" else "mean"
    return {
        "sequence": HeadFormat(pooling, _linear("classifier"), shared=True),
        "token": HeadFormat("all", _linear("classifier"), shared=True),
    }


_ENCODERS = {
    "bert": Encoder(_bert, shared="bert.pooler"),
    "distilbert": Encoder(_distilbert),
    "modernbert": Encoder(_modernbert, shared="head"),
    "roberta": Encoder(_roberta, skips_padding=True),
    "xlm-roberta": Encoder(_roberta, skips_padding=True),
}
