"""What a task head is, by the names that its modules have in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
    # The base's own part of its heads comes between the two.
    shared: bool = False


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
