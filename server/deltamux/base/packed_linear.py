"""Linear layers whose weights are laid out for the CPU once, when they are loaded.

In the layout of our own C code a row's result does not depend on how many rows stand beside it, and
few rows take as long as the weights take to be read: two bytes each where all of a layer's are
numbers of bfloat16, as those of most checkpoints are. Where there is no C compiler, oneDNN's layout
gives the former. The plain product does neither, and is slower for any number of rows.

They lie in huge pages, where Linux has some.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltamux.base.huge_pages import collapse
from deltamux_kernels import native
from deltamux_kernels.native.panels import Panels


def pack_linears(model: nn.Module) -> None:
    """Replaces the float32 linear layers of a model on a CPU; does nothing to any other model."""
    packed = []
    # Only names are kept, so that each plain layer is gone before the next is packed.
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        if type(module) is nn.Linear and _can_pack(module.weight):
            parent, _, child = name.rpartition(".")
            packed.append(PackedLinear(module))
            setattr(model.get_submodule(parent), child, packed[-1])
    for linear in packed:
        collapse(*linear.memory)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    return native.available() or torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class PackedLinear(nn.Linear):
    """y = x W^T + b with W kept in that layout only.

    It is no parameter any more. Reading `weight` unpacks it into a new tensor.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        layout = Panels if native.available() else OneDnn
        self._packed: Panels | OneDnn = layout(linear.weight.detach(), linear.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._packed.matrix()

    @property
    def memory(self) -> tuple[int, int]:
        """Where the packed weight lies, and how many bytes it takes."""
        return self._packed.memory

    def forward(self, x: Tensor) -> Tensor:
        return self._packed.product(x)


class OneDnn:
    """A matrix [N, K] in oneDNN's layout; float32, on a CPU."""

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        """`bias` [N]."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(matrix)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        y: Tensor = self._product(x, self._packed, self._bias, "none", [], "")
        return y

    def matrix(self) -> Tensor:
        dense: Tensor = self._packed.to_dense()
        return dense

    @property
    def memory(self) -> tuple[int, int]:
        address = torch.ops.mkldnn.data_ptr(self._packed)
        return address, torch.ops.mkldnn._nbytes(self._packed)
