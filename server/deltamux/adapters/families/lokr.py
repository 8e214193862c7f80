"""LoKr in PEFT's format: the Kronecker product of two small matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Change, Factors, low_rank_is_smaller
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import read_ranks, read_scales
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, ScaledTuner, Tuner
from deltamux.base.structure import SiteSpec

_MATRICES = ("lokr_w1", "lokr_w2")
_PARTS = tuple(f"{matrix}{end}" for matrix in _MATRICES for end in ("", "_a", "_b"))

# Dropout, the first draw, and what convolutions do.
_HARMLESS = (
    *("init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale"),
    "use_effective_conv2d",
)

_MAX_FACTOR = 1 << 20


class LoKr(ModuleFamily):
    """Each matrix is saved whole or as a product of rank r; the scale is alpha / r in any case."""

    name = "lokr"
    peft_types = ("LOKR",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            return _LoKr(
                read_targets(fields),
                Names(_PARTS),
                read_ranks(fields),
                read_scales(fields, "alpha"),
                as_integer(
                    "decompose_factor", fields.take("decompose_factor", -1), -1, _MAX_FACTOR
                ),
                fields.take_bool("decompose_both"),
            )


@dataclass(frozen=True, eq=False)
class _LoKr(ScaledTuner):
    # What PEFT was told of the sides of the first matrix, -1 for nothing.
    factor: int
    # Whether the first matrix may be a product, too.
    both: bool

    def change(self, site: SiteSpec, given: Given) -> Change:
        """(B1 A1) x (B2 A2) = (B1 x B2) (A1 x A2), where x is Kronecker's product."""
        rank, scale = self.rank_and_scale(site)
        heights, widths = (_split(n, self.factor) for n in (site.out_features, site.in_features))
        shapes = zip(heights, widths, strict=True)
        (a1, b1), (a2, b2) = (
            _factors(site, given.modules, matrix, shape, rank if product else None)
            for matrix, shape, product in zip(_MATRICES, shapes, (self.both, True), strict=True)
        )
        if not low_rank_is_smaller(site, a1.shape[0] * a2.shape[0]):
            return torch.kron(b1 @ a1, b2 @ a2) * scale
        return torch.kron(a1, a2), torch.kron(b1, b2) * scale


def _split(size: int, factor: int) -> tuple[int, int]:
    """PEFT's two sides whose product is `size`: the first is the factor, or else the largest
    divisor that is neither above it nor above the other side."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(max(factor, 1), math.isqrt(size))
    first = next(side for side in range(most, 0, -1) if size % side == 0)
    return first, size // first


def _factors(
    site: SiteSpec, modules: ModuleTensors, matrix: str, shape: tuple[int, int], rank: int | None
) -> Factors:
    """A matrix is a product where the rank is less than half of its longer side."""
    if rank is None or rank >= max(shape) / 2:
        return _trivial(modules.take_shaped(site, matrix, shape))
    b = modules.take_shaped(site, f"{matrix}_a", (shape[0], rank))
    a = modules.take_shaped(site, f"{matrix}_b", (rank, shape[1]))
    return _trivial(b @ a) if rank > min(shape) else (a, b)


def _trivial(matrix: Tensor) -> Factors:
    """The matrix and a unit matrix, whose side is the smaller one."""
    rows, columns = matrix.shape
    if rows < columns:
        return matrix, torch.eye(rows)
    return torch.eye(columns), matrix
