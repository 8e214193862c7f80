"""LoKr in PEFT's format: the Kronecker product of two small matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.low_rank_delta import Change, Factors, low_rank_is_smaller
from deltamux.adapters.peft.low_rank_family import Given, LowRankFamily, Names, Tuner
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.per_module import read_ranks, read_scales
from deltamux.adapters.peft.scaled_tuner import ScaledTuner
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.base.structure import SiteSpec
from deltamux.errors import InvalidArgument

_MATRICES = ("lokr_w1", "lokr_w2")
_PARTS = tuple(f"{matrix}{end}" for matrix in _MATRICES for end in ("", "_a", "_b"))

# Dropout, the first draw, how the shapes in the file were chosen, and what convolutions do.
_HARMLESS = (
    *("decompose_both", "decompose_factor", "init_weights", "module_dropout", "rank_dropout"),
    *("rank_dropout_scale", "use_effective_conv2d"),
)


class LoKr(LowRankFamily):
    """Each matrix is saved whole or as a product of rank r; the scale is alpha / r in any case."""

    name = "lokr"
    peft_types = ("LOKR",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            ranks, alphas = read_ranks(fields), read_scales(fields, "alpha")
            return _LoKr(read_targets(fields), Names(_PARTS), ranks, alphas)


class _LoKr(ScaledTuner):
    def change(self, site: SiteSpec, given: Given) -> Change:
        """(B1 A1) x (B2 A2) = (B1 x B2) (A1 x A2), where x is Kronecker's product."""
        rank, scale = self.rank_and_scale(site)
        (a1, b1), (a2, b2) = (_factors(site, given.modules, m, rank) for m in _MATRICES)
        shape = (b1.shape[0] * b2.shape[0], a1.shape[1] * a2.shape[1])
        if shape != (site.out_features, site.in_features):
            raise other_base(site, f"a Kronecker product of {shape}")
        if not low_rank_is_smaller(site, a1.shape[0] * a2.shape[0]):
            return torch.kron(b1 @ a1, b2 @ a2) * scale
        return torch.kron(a1, a2), torch.kron(b1, b2) * scale


def _factors(site: SiteSpec, modules: ModuleTensors, matrix: str, rank: int) -> Factors:
    whole = modules.take_if_any(site.name, matrix, 2)
    if whole is not None:
        return _trivial(whole.float())
    b, a = (modules.take(site.name, f"{matrix}_{side}", 2).float() for side in "ab")
    if b.shape[1] != rank or a.shape[0] != rank:
        raise InvalidArgument(
            f"{site.name}: {matrix} of {tuple(b.shape)} and {tuple(a.shape)}, the rank is {rank}",
            reason="RANK_MISMATCH",
        )
    return _trivial(b @ a) if rank > min(b.shape[0], a.shape[1]) else (a, b)


def _trivial(matrix: Tensor) -> Factors:
    """The matrix and a unit matrix, whose side is the smaller one."""
    rows, columns = matrix.shape
    if rows < columns:
        return matrix, torch.eye(rows)
    return torch.eye(columns), matrix
