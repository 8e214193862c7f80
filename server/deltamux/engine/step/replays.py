"""What stands in for the modules of a model in steps that come again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from torch import Tensor

from deltamux.engine.step.batch import StepBatch, StepInputs

# Logits [rows, V] of the given rows of a step.
Forward: TypeAlias = Callable[[StepInputs, Tensor], Tensor]


class Replays(Protocol):
    """Steps of one runner that were taken down, by their launches or their calls."""

    def run(self, step: StepBatch) -> Tensor | None:
        """Logits [S, W], float32, until the next call; None for a step that is not replayed."""
