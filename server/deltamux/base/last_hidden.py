"""The last hidden states of a model, as they pass on their way to its head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class LastHidden:
    """Keeps what the model without its head gave last, until it is taken or replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._kept: Tensor | None = None
        model.base_model.register_forward_hook(self._keep)

    def take(self) -> Tensor:
        """Hidden states [T, width] of the packed rows of the last forward pass."""
        kept, self._kept = self._kept, None
        assert kept is not None, "the model ran without its body"
        return kept[0]

    def _keep(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._kept = output[0]
