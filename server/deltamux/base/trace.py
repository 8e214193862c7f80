"""Watches one forward pass of a model: which modules read which rows, and what they gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# A prime, so that no axis of heads or experts is mistaken for the token axis.
_TOKENS = 11


@dataclass(frozen=True)
class Call:
    """The first call of a module, which reads one row or id a token, or of a norm of its heads."""

    name: str
    module: nn.Module
    # Held until the trace ends: the id of a freed tensor may be taken by another one.
    input: Tensor
    # How often the input had been changed in place.
    version: int
    output: Tensor

    @property
    def token_axis(self) -> int | None:
        """Which axis of the input counts the tokens, where each has several rows."""
        axes = self.input.shape[:-1]
        return None if axes.numel() == _TOKENS else axes.index(_TOKENS)


def trace(model: PreTrainedModel) -> list[Call]:
    """The linear modules, embeddings and norms that one short forward calls, in order."""
    calls: dict[str, Call] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if name not in calls and _reads_token_rows(module, args):
            calls[name] = Call(name, module, args[0], args[0]._version, output)

    with _watching(model, record):
        forward_plainly(model, _TOKENS)
    return list(calls.values())


def forward_plainly(model: PreTrainedModel, num_tokens: int) -> None:
    """One forward over arbitrary tokens at positions 0 .. num_tokens - 1, without a cache.

    A model without a head of the vocabulary runs without any. Changes in place are counted.
    """
    embedding = model.get_input_embeddings()
    vocabulary, device = embedding.num_embeddings, embedding.weight.device
    positions = torch.arange(num_tokens, device=device)[None]
    body = model.base_model if model.get_output_embeddings() is None else model
    with torch.no_grad():
        body(input_ids=(positions + 3) % vocabulary, position_ids=positions, use_cache=False)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def is_norm(module: nn.Module) -> bool:
    """A module whose only parameters are a weight, and perhaps a bias, for each feature."""
    parameters = dict(module.named_parameters())
    if not parameters.keys() <= {"weight", "bias"} or any(module.children()):
        return False
    return "weight" in parameters and all(p.ndim == 1 for p in parameters.values())


@contextmanager
def _watching(
    model: nn.Module, record: Callable[[str, nn.Module, tuple[Any, ...], Tensor], None]
) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def call(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            if not kwargs:
                record(name, module, args, output)

        return call

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if is_linear(module) or isinstance(module, nn.Embedding) or is_norm(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reads_token_rows(module: nn.Module, args: tuple[Any, ...]) -> bool:
    if len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    if is_norm(module):
        return _TOKENS in args[0].shape[:-1]
    rows = args[0] if isinstance(module, nn.Embedding) else args[0][..., 0]
    return rows.numel() == _TOKENS
