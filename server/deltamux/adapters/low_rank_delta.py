"""Changes of a linear module's weight: factors of low rank, or a matrix where that is smaller."""

from __future__ import annotations

from torch import Tensor

from deltamux.adapters.module_tensors import other_base
from deltamux.adapters.primitives.dense import DenseDelta
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.base.structure import SiteSpec

# a [rank, in] and b [out, rank], float32, with all scales folded in: y += (x a^T) b^T.
Factors = tuple[Tensor, Tensor]

# Factors, or a matrix [out, in], float32, where there are none that are smaller.
Change = Factors | Tensor


def smallest(site: SiteSpec, change: Change) -> LowRank | DenseDelta | None:
    """The smallest exact form of the change, in float32; None where it has rank 0."""
    if isinstance(change, tuple):
        a, b = change
        if not a.shape[0]:
            return None
        if low_rank_is_smaller(site, a.shape[0]):
            return LowRank(a, b.T)
        change = b @ a
    if change.shape != (site.out_features, site.in_features):
        raise other_base(site, f"a delta of {tuple(change.shape)}")
    return DenseDelta(change)


def low_rank_is_smaller(site: SiteSpec, rank: int) -> bool:
    """Whether factors of this rank take less memory than a matrix of the module's size."""
    return rank * (site.in_features + site.out_features) < site.in_features * site.out_features
