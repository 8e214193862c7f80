"""One module of a base model with the banks of the adapters that act there."""

from __future__ import annotations

from torch import Tensor, nn

from deltamux.adapters.primitives.added_tokens import AddedColumnsBank, AddedTokens
from deltamux.adapters.primitives.bottleneck import Residual
from deltamux.adapters.primitives.payload import InputBank, OutputBank
from deltamux.adapters.sites.banks import Banks
from deltamux.adapters.sites.rows import Rows
from deltamux.base.stacked_linears import StackedLinear
from deltamux.base.structure import SiteSpec


class Site(nn.Module):
    """A module of the base with the banks that act on its input and output, row by row.

    There is no active adapter: the rows of the step alone say what is added where.
    """

    def __init__(
        self, base: nn.Module, spec: SiteSpec, banks: Banks, residual: Residual | None, rows: Rows
    ) -> None:
        """`residual` is where its input is left, if anybody wants it."""
        super().__init__()
        self.base = base
        self.spec = spec
        self.banks = banks
        # Slots with a payload here, a product with the input that this site shares, or a
        # bottleneck that needs its input.
        self.slots: set[int] = set()
        self._alone = base.alone if isinstance(base, StackedLinear) else base
        self._inputs = tuple(bank for bank in banks.values() if isinstance(bank, InputBank))
        self._outputs = tuple(bank for bank in banks.values() if isinstance(bank, OutputBank))
        self._residual = residual
        # What gives a head more columns than the base has.
        added = banks.get(AddedTokens)
        self._added = added if isinstance(added, AddedColumnsBank) else None
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
