"""What a primitive is: a payload parsed on the host, and a bank that applies it on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class Payload:
    """One primitive's tensors of one adapter at one site, in host memory and the serving dtype;
    those of `LowRank` may be in bfloat16 where that is float32 and they are the same numbers.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those among its fields, in their order."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Tensor))


class Bank(Protocol):
    """Device storage of one primitive at one site, for the adapters of all slots."""

    # Slots that have something here; a step of none of them costs nothing.
    slots: set[int]

    def pieces(self, payload: Any) -> Sequence[tuple[PackedMatrices, Tensor]]:
        """The payload as matrices, each with the store that it goes to.

        Matrices of several sites may go to one store: they are stacked there, in call order.
        """
        ...

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:
        """Tells where in its store's stack each of the pieces begins."""
        ...


class InputBank(Bank, Protocol):
    """A bank that acts before the module does."""

    def before(self, x: Tensor, segments: Segments) -> Tensor:
        """What the module is given in place of `x` [..., in], which stays as it is."""
        ...


class OutputBank(Bank, Protocol):
    """A bank that acts on what the module gives."""

    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Changes the module's output `y` [rows, out] in place; `x` is the input it was given."""
        ...
