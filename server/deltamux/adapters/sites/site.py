"""One module of a base model with the banks of the adapters that act there."""

from __future__ import annotations

from torch import Tensor, nn

from deltamux.adapters.primitives.added_tokens import AddedTokens
from deltamux.adapters.primitives.payload import Bank, InputBank, OutputBank, Payload
from deltamux.adapters.sites.banks import SiteBanks
from deltamux.adapters.sites.rows import Rows
from deltamux.base.stacked_linears import StackedLinear
from deltamux.base.structure import SiteSpec


class Site(nn.Module):
    """A module of the base with the banks that act on its input and output, row by row.

    There is no active adapter: the rows of the step alone say what is added where.
    """

    def __init__(self, base: nn.Module, spec: SiteSpec, banks: SiteBanks, rows: Rows) -> None:
        super().__init__()
        self.base = base
        self.spec = spec
        self.banks: dict[type[Payload], Bank] = {**banks.inputs, **banks.outputs, **banks.kept}
        if banks.added is not None:
            self.banks[AddedTokens] = banks.added
        # Slots with a payload here, a product with the input that this site shares, or a
        # bottleneck that needs its input.
        self.slots: set[int] = set()
        self._alone = base.alone if isinstance(base, StackedLinear) else base
        self._inputs = tuple(banks.inputs.values())
        self._outputs = tuple(banks.outputs.values())
        self._residual = banks.residual
        self._added = banks.added
        self._rows = rows
        # Those banks that act, and the mix of adapters in which they do.
        self._acting: tuple[list[InputBank], list[OutputBank]] | None = None
        self._mix: object = None
        self._sampled = spec.kind == "head" or spec.pooled

    @property
    def weight(self) -> Tensor:
        """Some modelling code reads a projection's weight."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if self._mix is not self._rows.mix:
            self._choose()
        if self._acting is None:
            y: Tensor = self.base(x)
            return y
        return self._adapt(x, *self._acting)

    def _choose(self) -> None:
        """The same step after step, until the mix of adapters changes."""
        self._mix, slots = self._rows.mix, self._rows.slots
        self._acting = None
        if not self.slots.isdisjoint(slots):
            inputs = [bank for bank in self._inputs if not bank.slots.isdisjoint(slots)]
            outputs = [bank for bank in self._outputs if not bank.slots.isdisjoint(slots)]
            self._acting = inputs, outputs

    def _adapt(self, x: Tensor, inputs: list[InputBank], outputs: list[OutputBank]) -> Tensor:
        segments = self._rows.sampled if self._sampled else self._rows.tokens
        if self._residual is not None:
            self._residual.tensor = x
        given = x
        for bank in inputs:
            given = bank.before(given, segments)
        y: Tensor = self.base(given) if given is x else self._alone(given)
        rows = self.spec.rows(y)
        for output in outputs:
            output.after(x, rows, segments)
        if self._added is None or self._added.slots.isdisjoint(segments.slots):
            return y
        return self._added.widen(x, y, segments)
