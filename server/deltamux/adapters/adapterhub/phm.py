"""Matrices that are sums of Kronecker products (Compacter's PHM layers), expanded."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from deltamux.adapters.adapterhub.bottleneck_config import Phm
from deltamux.adapters.adapterhub.keyed_tensors import KeyedTensors

Position = Literal["down", "up"]


class PhmWeights:
    """Weights of PHM layers: `dim` products of a rule [dim, dim] and a block [in/dim, out/dim].

    Rules and blocks may be products of two factors, and shared by all layers; what is shared is
    named below `shared`.
    """

    def __init__(self, phm: Phm, tensors: KeyedTensors, shared: str) -> None:
        self._phm = phm
        self._tensors = tensors
        self._shared = shared
        self._kept: dict[str, Tensor] = {}

    def matrix(self, layer: str, position: Position, fan_in: int, fan_out: int) -> Tensor:
        """[out, in], as a linear layer has it."""
        rule, block = self._rule(layer), self._block(layer, position, fan_in, fan_out)
        return torch.stack([torch.kron(*pair) for pair in zip(rule, block, strict=True)]).sum(0).T

    def bias(self, layer: str, fan_out: int) -> Tensor:
        return self._tensors.take(f"{layer}.b", fan_out) if self._phm.bias else torch.zeros(fan_out)

    def _rule(self, layer: str) -> Tensor:
        n, factorized = self._phm.dim, self._phm.factorized_rule
        if not self._phm.shared_rule:
            return self._product(f"{layer}.phm_rule", factorized, n, n, 1, n)
        return self._once(f"{self._shared}.phm_rule", factorized, n, n, 1, n)

    def _block(self, layer: str, position: Position, fan_in: int, fan_out: int) -> Tensor:
        n, r, factorized = self._phm.dim, self._phm.rank, self._phm.factorized_weight
        sizes = n, fan_in // n, r, fan_out // n
        if not self._phm.shared_weight:
            return self._product(f"{layer}.W", factorized, *sizes)
        return self._once(f"{self._shared}.W_{position}", factorized, *sizes)

    def _once(self, name: str, factorized: bool, *sizes: int) -> Tensor:
        if name not in self._kept:
            self._kept[name] = self._product(name, factorized, *sizes)
        return self._kept[name]

    def _product(self, name: str, factorized: bool, n: int, i: int, r: int, o: int) -> Tensor:
        """[n, i, o], or the product of its factors `_left` [n, i, r] and `_right` [n, r, o]."""
        if not factorized:
            return self._tensors.take(name, n, i, o)
        left, right = (
            self._tensors.take(f"{name}_left", n, i, r),
            self._tensors.take(f"{name}_right", n, r, o),
        )
        return torch.bmm(left, right)
