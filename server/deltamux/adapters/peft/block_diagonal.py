"""BD-LoRA: one of LoRA's two matrices is block diagonal, and only its blocks are saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, as_integer, refuse_field
from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.base.structure import SiteSpec
from deltamux.errors import InvalidArgument

_MAX_BLOCKS = 1 << 16
_IN_A, _IN_B = "target_modules_bd_a", "target_modules_bd_b"


@dataclass(frozen=True)
class BlockDiagonal:
    """Parts of the names of modules whose A, and of those whose B, is made of blocks."""

    blocks: int
    in_a: tuple[str, ...]
    in_b: tuple[str, ...]
    strict: bool

    def expand(self, site: SiteSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """`a` and `b` with the zeros between the blocks. Raises InvalidArgument."""
        a_named, b_named = (any(n in site.name for n in names) for names in (self.in_a, self.in_b))
        if a_named and b_named:
            raise self._refusal(site, "names it twice")
        if self.strict and not (a_named or b_named):
            raise self._refusal(site, "does not name it")
        if a_named:
            return self._spread(site, a), b
        return a, self._spread(site, b) if b_named else b

    def _spread(self, site: SiteSpec, matrix: Tensor) -> Tensor:
        if matrix.shape[0] % self.blocks:
            raise self._refusal(site, f"asks for {self.blocks} blocks of {matrix.shape[0]} rows")
        spread: Tensor = torch.block_diag(*matrix.chunk(self.blocks))  # type: ignore[no-untyped-call]
        return spread

    def _refusal(self, site: SiteSpec, why: str) -> InvalidArgument:
        message = f"{CONFIG}: {site.name} is targeted, but use_bdlora {why}"
        return InvalidArgument(message, reason="BAD_FIELD", field="use_bdlora")


def read_blocks(fields: Fields) -> BlockDiagonal | None:
    """Takes use_bdlora; None where it is off."""
    value = fields.take("use_bdlora")
    if not value:
        return None
    defaults: dict[str, Json] = {"nblocks": 1, "match_strict": True, _IN_A: [], _IN_B: []}
    if not isinstance(value, dict) or value.keys() - defaults.keys():
        refuse_field("use_bdlora", value, f"an object of {', '.join(defaults)}")
    inner = Fields({**defaults, **value})
    return BlockDiagonal(
        as_integer("use_bdlora.nblocks", inner.take("nblocks"), 1, _MAX_BLOCKS),
        inner.take_names(_IN_A),
        inner.take_names(_IN_B),
        inner.take_bool("match_strict"),
    )
