"""What a primitive is: a payload parsed on the host, and a bank that applies it on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

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


class Bank(ABC):
    """Device storage of one primitive at one site, for the adapters of all slots."""

    # Whether C code on a CPU finds by slot what is here. The torch of all other banks is told in
    # every step by the host which rows there are, and which matrices for them.
    in_c = False

    def __init__(self) -> None:
        # Slots that have something here; a step of none of them costs nothing.
        self.slots: set[int] = set()

    @abstractmethod
    def pieces(self, payload: Any) -> Sequence[tuple[PackedMatrices, Tensor]]:
        """The payload as matrices, each with the store that it goes to.

        Matrices of several sites may go to one store: they are stacked there, in call order.
        """

    def placed(self, slot: int, first_rows: Sequence[int]) -> None:  # noqa: B027
        """Tells where in its store's stack each of the pieces begins; most are alone there."""


class InputBank(Bank):
    """A bank that acts before the module does."""

    @abstractmethod
    def before(self, x: Tensor, segments: Segments) -> Tensor:
        """What the module is given in place of `x` [..., in], which stays as it is."""


class OutputBank(Bank):
    """A bank that acts on what the module gives."""

    @abstractmethod
    def after(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Changes the module's output `y` [rows, out] in place; `x` is the input it was given."""
