"""What a family of adapters is: it claims a checkpoint format and parses it into payloads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import Structure


@dataclass(frozen=True, eq=False)
class Parsed:
    """What a family made of a checkpoint; the fields are those of Adapter."""

    payloads: Mapping[str, tuple[Payload, ...]]
    rank: int
    parameters: int
    notes: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    reach: int | None = None


class Family(Protocol):
    """Families know the primitives and never each other."""

    name: str

    def claims(self, manifest: Manifest) -> bool:
        """Whether the checkpoint is of this family, going by its manifest alone."""
        ...

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        """Payloads in `dtype` for each site that the adapter changes.

        Raises InvalidArgument or FailedPrecondition for whatever is left over, missing,
        mis-shaped or not understood; nothing is ever passed over.
        """
        ...
