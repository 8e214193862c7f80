"""Task head: the adapter's own linear layers over pooled hidden states, in place of generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from deltamux.adapters.primitives.payload import Bank, Payload
from deltamux.base.task_heads import Activation, Pooling
from deltamux_kernels.packed import PackedMatrices

# How logits become scores.
Scoring = Literal["softmax", "sigmoid", "none"]

_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Layer:
    """y = activation(x W^T + b) with W [rows, width]; b may be missing."""

    rows: int
    biased: bool
    activation: Activation


@dataclass(frozen=True)
class HeadPlan:
    """A head without its numbers: what it is given, and what comes out."""

    pooling: Pooling
    # Tokens that do not count as a sequence's last one.
    pad_token_id: int | None
    # The base's own part of its heads comes before the layers.
    shared: bool
    layers: tuple[Layer, ...]
    labels: tuple[str, ...]
    scoring: Scoring

    @property
    def biased_rows(self) -> list[int]:
        """Rows of each layer that has a bias."""
        return [layer.rows for layer in self.layers if layer.biased]


@dataclass(frozen=True, eq=False)
class TaskHead(Payload):
    """`weights` [rows, width] of each layer, and `biases` [rows] of those that have one."""

    plan: HeadPlan
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weights + self.biases


class TaskHeadBank(Bank):
    """One head a slot. Few rows reach it, one of a sequence or those of a prompt, so that a
    product for each slot is enough."""

    def __init__(self, weights: PackedMatrices, biases: PackedMatrices) -> None:
        """`biases` is 1 wide: heads differ in how many labels they have."""
        super().__init__()
        # By slot.
        self.plans: dict[int, HeadPlan] = {}
        self._weights = weights
        self._biases = biases

    def pieces(self, payload: TaskHead) -> Sequence[tuple[PackedMatrices, Tensor]]:
        weights = [(self._weights, weight) for weight in payload.weights]
        return (*weights, *((self._biases, bias[:, None]) for bias in payload.biases))

    def logits(self, x: Tensor, slot: int) -> Tensor:
        """Logits [rows, labels] of the pooled rows `x` [rows, width] under the slot's head."""
        plan, weights, biases = (
            self.plans[slot],
            self._weights.views[slot],
            self._biases.views[slot],
        )
        assert weights is not None
        x = x.to(weights.dtype)
        matrices = weights.split_with_sizes([layer.rows for layer in plan.layers])
        vectors = iter(() if biases is None else biases[:, 0].split_with_sizes(plan.biased_rows))
        for layer, matrix in zip(plan.layers, matrices, strict=True):
            y = functional.linear(x, matrix, next(vectors) if layer.biased else None)
            x = _ACTIVATIONS[layer.activation](y)
        return x
