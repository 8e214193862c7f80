"""OFT in PEFT's format: the input of a module is rotated block by block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import (
    Fields,
    as_integer,
    as_number,
    refuse_field,
    unsupported,
)
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.adapters.payloads.rotations import cayley, side_by_side, skew_symmetric
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import LINEAR_OR_EMBEDDING, read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.block_rotation import InputRotation, OutputRotation
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec

_LINEAR, _EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"

# PEFT rotates the inputs of linear modules only, whose weights lie one way.
_HARMLESS = ("fan_in_fan_out", "init_weights", "module_dropout")

_MAX = 1 << 20
_MAX_TERMS = 64


class Oft(ModuleFamily):
    """Rotations by Cayley's transform, or by the first terms of its Neumann series."""

    name = "oft"
    peft_types = ("OFT",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            number, size = _blocking(fields)
            eps = as_number("eps", fields.take("eps", 6e-5), 1e6)
            return _Oft(
                read_targets(fields, "oft_only"),
                Names((_LINEAR, _EMBEDDING)),
                number,
                size,
                fields.take_bool("block_share"),
                eps if fields.take_bool("coft") else None,
                _terms(fields),
            )


@dataclass(frozen=True, eq=False)
class _Oft(Tuner):
    kinds = LINEAR_OR_EMBEDDING
    # One of the two is 0.
    block_number: int
    block_size: int
    shared: bool
    # The largest norm of a block's parameters, over the root of their number; None for any.
    constraint: float | None
    # Terms of the Neumann series; None for the exact transform.
    terms: int | None

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        embedding = site.kind == "embedding"
        width = site.out_features if embedding else site.in_features
        part, shape = _EMBEDDING if embedding else _LINEAR, self._shape(width)
        rotations = self._rotations(given.modules.take_shaped(site, part, shape))
        size = rotations.shape[1]
        blocks = side_by_side(rotations.expand(width // size, size, size))
        yield OutputRotation(blocks) if embedding else InputRotation(blocks)

    def _shape(self, width: int) -> tuple[int, int]:
        """Blocks, parameters of each; as in PEFT the nearest divisor of the width decides."""
        number = _nearest_divisor(width, self.block_number or self.block_size)
        size = width // number
        if self.block_size:
            number, size = size, number
        return 1 if self.shared else number, size * (size - 1) // 2

    def _rotations(self, upper: Tensor) -> Tensor:
        """The blocks [number, size, size] whose parameters are the rows of `upper`."""
        size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
        skew = skew_symmetric(upper, size)
        if self.constraint is not None:
            most = self.constraint / math.sqrt(len(skew))
            norms = torch.linalg.matrix_norm(skew, keepdim=True)
            skew = torch.where(norms <= most, skew, most * skew / norms)
        return cayley(skew) if self.terms is None else _neumann(skew, self.terms)


def _blocking(fields: Fields) -> tuple[int, int]:
    """The number of blocks and their size, of which one is 0."""
    number, size = fields.take("r", 0), fields.take("oft_block_size")
    if size is None:
        raise unsupported("OFT without oft_block_size (written before PEFT 0.14)")
    number, size = as_integer("r", number, 0, _MAX), as_integer("oft_block_size", size, 0, _MAX)
    if bool(number) == bool(size):
        refuse_field("oft_block_size", size, f"0 if r (here {number}) is not, and only then")
    return number, size


def _terms(fields: Fields) -> int | None:
    terms = as_integer(
        "num_cayley_neumann_terms", fields.take("num_cayley_neumann_terms", 5), 1, _MAX_TERMS
    )
    version = fields.take("peft_version")
    if not fields.take_bool("use_cayley_neumann", True):
        return None
    if not _settled(version):
        raise unsupported(
            f"the Neumann series of PEFT before 0.18 (peft_version {quoted(version)})"
        )
    return terms


def _settled(version: Json) -> bool:
    """Whether the series is the one that PEFT has had since 0.18."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})\.\d+(\.dev)?", str(version))
    if found is None:
        return False
    release = int(found[1]), int(found[2])
    return release > (0, 18) or (release == (0, 18) and not found[3])


def _nearest_divisor(width: int, wanted: int) -> int:
    divisors = (d for d in range(1, width + 1) if width % d == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^last: as many terms as PEFT takes, which are four for three."""
    identity = torch.eye(skew.shape[1]).expand_as(skew)
    if terms < 3:
        return identity + (terms - 1) * 2 * skew
    total, power = identity + 2 * skew, skew
    for _ in range(2, max(terms - 1, 3)):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew
