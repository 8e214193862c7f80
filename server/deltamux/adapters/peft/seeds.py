"""Frozen random matrices that a checkpoint leaves out, drawn again as PEFT drew them.

Torch's generator on the CPU gives the same numbers for the same seed on every machine; the tests
of the families that draw hold some of them fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.base.structure import SiteSpec, Structure

_MAX_SEED = (1 << 63) - 1


def as_seed(name: str, value: Json) -> int:
    return as_integer(name, value, 0, _MAX_SEED)


def kaiming_uniform(shapes: Iterable[tuple[int, int]], seed: int) -> list[Tensor]:
    """Matrices of these shapes, float32 on the CPU, one after the other from one generator."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for shape in shapes:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return drawn


def as_kept(drawn: Tensor, site: SiteSpec, structure: Structure) -> Tensor:
    """Drawn numbers as PEFT keeps them: rounded to the dtype of the base's weight, in float32."""
    return drawn.to(structure.weight(site.name).dtype).float()
