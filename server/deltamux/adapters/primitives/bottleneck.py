"""Bottleneck at the end of a sublayer: y += U f(D z + b) + c, with z one of what meets there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux_kernels.activate import Activations, activate
from deltamux_kernels.expand import Columns, expand
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.row_norm import NormForm, row_norm
from deltamux_kernels.segments import Segments
from deltamux_kernels.shrink import shrink


@dataclass(frozen=True, eq=False)
class Bottleneck(Payload):
    """`down` [width, hidden] and its `bias` [width], an activation, `up` [width + 1, hidden].

    The last row of `up` is the bias that is added after it; the adapter's scale is folded into
    all rows. `norm_before` and `norm_after` [2, hidden] are weight and bias of a LayerNorm of what
    is read, and of what is added. Subclasses say what is read.
    """

    down: Tensor
    bias: Tensor
    activation: str
    up: Tensor
    norm_before: Tensor | None = None
    norm_after: Tensor | None = None


class OutputBottleneck(Bottleneck):
    """It reads what the sublayer gives."""


class ResidualBottleneck(Bottleneck):
    """It reads the residual, as the sublayer does: the two run in parallel."""


class SumBottleneck(Bottleneck):
    """It reads what the layer goes on with: the sum of both, normed where layers norm last."""


# Of a bottleneck's own LayerNorms.
_LAYER_NORM = NormForm(epsilon=1e-5, centred=True)
# y and the residual, [rows, hidden] each -> what a bottleneck reads; neither may be changed.
Read = Callable[[Tensor, Tensor], Tensor]


def read_output(y: Tensor, residual: Tensor) -> Tensor:
    return y


def read_residual(y: Tensor, residual: Tensor) -> Tensor:
    return residual


def read_sum(norm: nn.Module | None) -> Read:
    """`norm` is the base's own, where its layers norm last."""

    def read(y: Tensor, residual: Tensor) -> Tensor:
        total = y + residual
        if norm is not None:
            total = norm(total)
        return total

    return read


class Residual:
    """What goes around the sublayer that runs now; one for a model, whose sublayers take turns.

    The site that reads it leaves it here for the site in which the sublayer ends.
    """

    tensor: Tensor | None = None

    def rows(self, y: Tensor) -> Tensor:
        """The residual in the shape of the sublayer's output [rows, hidden]."""
        assert self.tensor is not None
        return self.tensor.reshape(y.shape)


class BottleneckBank(OutputBank):
    """The bottlenecks that read one thing, of all slots, at the end of one sublayer.

    Those with a LayerNorm of what is added are rare, and have a store of their own for `up`.
    """

    def __init__(
        self, arena: Tensor, slots: int, hidden: int, residual: Residual, read: Read
    ) -> None:
        super().__init__()
        self._residual = residual
        self._read = read
        self._down = PackedMatrices(arena, slots, hidden)
        self._up = PackedMatrices(arena, slots, hidden)
        self._norms_before = PackedMatrices(arena, slots, hidden)
        self._normed_up = PackedMatrices(arena, slots, hidden)
        self._norms_after = PackedMatrices(arena, slots, hidden)
        self._activations = Activations(arena, slots)
        self._columns = Columns(slots, arena.device)

    def pieces(self, payload: Bottleneck) -> Sequence[tuple[PackedMatrices, Tensor]]:
        column = self._activations.column(payload.bias, payload.activation)
        norms = (
            (self._norms_before, payload.norm_before),
            (self._norms_after, payload.norm_after),
        )
        return (
            (self._down, payload.down),
            (self._activations.packed, column),
            (self._up if payload.norm_after is None else self._normed_up, payload.up),
            *((store, norm) for store, norm in norms if norm is not None),
        )

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        self._activations.placed(slot)
        self._columns.set(slot, 0)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        z = self._read(y, self._residual.rows(y))
        if segments.most_rows(self._norms_before):
            given, z = z, z.clone()
            row_norm(z, given, self._norms_before, _LAYER_NORM, segments)
        a = activate(shrink(z, self._down, segments), self._activations, segments)
        expand(y, a, self._up, self._columns, segments)
        if segments.most_rows(self._normed_up):
            added = torch.zeros_like(y)
            expand(added, a, self._normed_up, self._columns, segments)
            row_norm(added, added, self._norms_after, _LAYER_NORM, segments)
            y += added
