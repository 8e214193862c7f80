"""Which task heads transformers puts on a model, by the names that their modules have there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

# What one set of scores speaks of: a whole sequence, or one token.
Level = Literal["sequence", "token"]
Pooling = Literal["all", "first", "last", "mean"]
Activation = Literal["none", "relu", "tanh"]


@dataclass(frozen=True)
class HeadModule:
    """A linear module of a head, under one of these names, and what is done to its output."""

    names: tuple[str, ...]
    biased: bool
    activation: Activation = "none"


@dataclass(frozen=True)
class HeadFormat:
    """How hidden states are pooled, and the modules behind; the last one maps to the labels."""

    pooling: Pooling
    modules: tuple[HeadModule, ...]


@dataclass(frozen=True)
class TaskHeads:
    """What a head needs to know of its model."""

    # Of the hidden states that it reads.
    width: int
    # Name of the model without any head: inside a classifier, as in a language model.
    body: str
    formats: Mapping[Level, HeadFormat]
    # Labels and problem type that the model's own config names, for heads of as many labels.
    labels: tuple[str, ...]
    problem_type: str | None
    # Tokens that do not count as a sequence's last one.
    pad_token_id: int | None


def find_task_heads(model: PreTrainedModel) -> TaskHeads:
    """What transformers' AutoModelFor...Classification would put on this model."""
    config = model.config.get_text_config()
    return TaskHeads(
        width=model.get_output_embeddings().weight.shape[1],
        body=model.base_model_prefix,
        formats=_decoder_formats(config),
        labels=_labels(model.config),
        problem_type=model.config.problem_type,
        pad_token_id=config.pad_token_id,
    )


def _decoder_formats(config: PreTrainedConfig) -> Mapping[Level, HeadFormat]:
    biased = getattr(config, "token_classification_bias", True)
    return {
        "sequence": HeadFormat("last", (HeadModule(("score",), biased=False),)),
        "token": HeadFormat("all", (HeadModule(("score", "classifier"), biased),)),
    }


def _labels(config: PreTrainedConfig) -> tuple[str, ...]:
    names = config.id2label
    return tuple(str(names[index]) for index in sorted(names))
