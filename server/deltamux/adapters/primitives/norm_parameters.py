"""Norm parameters: the adapter's own weight and bias in place of the norm's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deltamux.adapters.primitives.payload import OutputBank, Payload
from deltamux.base.norm_form import with_parameters
from deltamux.base.structure import SiteSpec
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.row_norm import NormForm, row_norm
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class NormParameters(Payload):
    """`weight` [width] and, for a norm that has one, `bias` [width], as the module reads them."""

    weight: Tensor
    bias: Tensor | None = None


class NormParametersBank(OutputBank):
    """A row of `width` numbers for each parameter of a slot, of a norm whose form is known."""

    def __init__(self, form: NormForm, spec: SiteSpec, parameters: PackedMatrices) -> None:
        super().__init__()
        self._form = form
        self._spec = spec
        self._parameters = parameters

    def pieces(self, payload: NormParameters) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return tuple((self._parameters, tensor[None]) for tensor in payload.tensors)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        row_norm(y, self._spec.rows(x), self._parameters, self._form, segments)


class CopiedNormBank(OutputBank):
    """The same for a norm that computes something else: a copy of it a slot, on the host.

    So whatever a norm computes (Gemma adds 1 to its weight) is computed by its own code.
    """

    def __init__(self, norm: nn.Module, spec: SiteSpec, parameters: PackedMatrices) -> None:
        super().__init__()
        self._norm = norm
        self._spec = spec
        self._parameters = parameters
        self._norms: dict[int, nn.Module] = {}

    def pieces(self, payload: NormParameters) -> Sequence[tuple[PackedMatrices, Tensor]]:
        return tuple((self._parameters, tensor[None]) for tensor in payload.tensors)

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        rows = self._parameters.views[slot]
        assert rows is not None
        self._norms[slot] = with_parameters(self._norm, rows)

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        given = self._spec.rows(x)
        for slot, rows, _ in segments.owners(self._parameters):
            y[rows] = self._norms[slot](given[rows])
