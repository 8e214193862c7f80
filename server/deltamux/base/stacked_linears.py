"""Linear layers that read one input, as one matrix product of one weight: q, k, v; gate, up.

A product of few rows takes as long as its weight takes to be read, and a GPU reads one large weight
faster than several small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltamux.base.structure import Structure


def stack_linears(model: nn.Module, structure: Structure) -> None:
    """Replaces the plain linear layers of each group, in the model and in its structure.

    One group gives its memory back before the next is stacked: never are two of them held twice.
    """
    for names in structure.groups:
        members = _members([structure.module(name) for name in names])
        for name, member in zip(names, members, strict=False):
            model.set_submodule(name, member)
            structure.replace(name, member)
        if any(member.weight.is_cuda for member in members):
            # No other stack fits into the places of its parts.
            torch.cuda.empty_cache()


def _members(modules: Sequence[nn.Module]) -> list[StackedLinear]:
    """One for each of the modules; none where one of them is not plain, or unlike the others.

    Packed layers, Conv1D and routers have arithmetic of their own.
    """
    linears = [module for module in modules if type(module) is nn.Linear]
    biases = [module.bias.detach() for module in linears if module.bias is not None]
    kinds = {(module.weight.dtype, module.weight.device) for module in linears}
    if len(linears) < len(modules) or len(biases) not in (0, len(linears)) or len(kinds) > 1:
        return []
    weight = torch.cat([module.weight.detach() for module in linears])
    bias = torch.cat(biases) if biases else None
    product = SharedProduct(weight, bias, [module.out_features for module in linears])
    return [StackedLinear(product, index) for index in range(len(linears))]


@dataclass(eq=False)
class _Computed:
    """The product with one input, by columns of each member; None where they were handed out.

    Holding the input keeps its identity from being taken over by another tensor.
    """

    x: Tensor
    version: int | None
    columns: list[Tensor | None]

    def is_of(self, x: Tensor) -> bool:
        return self.x is x and self.version == _version(x)


class SharedProduct:
    """x W^T + b of linear layers whose weights lie one below the other in W.

    The first in call order computes it, the others find it by the identity of the input, each once:
    what was handed out is the caller's, who may change it. The last drops it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        """weight [sum of sizes, K], bias [sum of sizes]."""
        self._weight = weight
        self._bias = bias
        self._sizes = list(sizes)
        self._computed: _Computed | None = None

    def parameters(self, member: int) -> tuple[Tensor, Tensor | None]:
        """Views of the member's weight [size, K] and bias [size]."""
        start = sum(self._sizes[:member])
        rows = slice(start, start + self._sizes[member])
        return self._weight[rows], None if self._bias is None else self._bias[rows]

    def columns(self, member: int, x: Tensor) -> Tensor | None:
        """Those of a member, a view; None where no product with this `x` waits for it."""
        if member == 0:
            y = linear(x, self._weight, self._bias)
            parts = y.split_with_sizes(self._sizes, -1)
            self._computed = _Computed(x, _version(x), list(parts))
        computed = self._computed
        self.passed(member)
        if computed is None or not computed.is_of(x):
            return None
        columns, computed.columns[member] = computed.columns[member], None
        return columns

    def passed(self, member: int) -> None:
        """To be told when a member was called, whatever it was given."""
        if member == len(self._sizes) - 1:
            self._computed = None


class StackedLinear(nn.Linear):
    """y = x W^T + b with W and b as views of what it shares with its siblings.

    Its result may be a view too, whose rows are further apart than they are wide.
    """

    def __init__(self, product: SharedProduct, member: int) -> None:
        nn.Module.__init__(self)
        weight, bias = product.parameters(member)
        self.out_features, self.in_features = weight.shape
        self.weight = _frozen(weight)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        self._product = product
        self._member = member

    def forward(self, x: Tensor) -> Tensor:
        y = self._product.columns(self._member, x)
        return linear(x, self.weight, self.bias) if y is None else y

    def alone(self, x: Tensor) -> Tensor:
        """The same for an input that no sibling is given."""
        self._product.passed(self._member)
        return linear(x, self.weight, self.bias)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _version(x: Tensor) -> int | None:
    """Changes in place, where they are counted.

    They are not in inference mode. There it is the model that does not change what siblings read:
    no group is found where it does.
    """
    return None if x.is_inference() else x._version
