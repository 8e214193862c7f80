"""Changes of a linear module's weight: factors of low rank, or a matrix where that is smaller."""

from __future__ import annotations

from torch import Tensor

from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.primitives.dense import DenseDelta
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.base.structure import SiteSpec

# a [rank, in] and b [out, rank], float32, with all scales folded in: y += (x a^T) b^T.
Factors = tuple[Tensor, Tensor]

# Factors, or a matrix [out, in], float32, where there are none that are smaller.
Change = Factors | Tensor


def smallest(site: SiteSpec, change: Change) -> LowRank | DenseDelta | None:
    """The smallest exact form of the change, in float32; None where it has rank 0.

    Raises FailedPrecondition (BASE_MISMATCH) for a change of a weight of another size.
    """
    a, b = change if isinstance(change, tuple) else (change, change)
    if (len(b), a.shape[1]) != (site.out_features, site.in_features):
        raise other_base(site, f"a change of {(len(b), a.shape[1])}")
    if not isinstance(change, tuple):
        return DenseDelta(change)
    if not len(a):
        return None
    return LowRank(a, b.T) if low_rank_is_smaller(site, len(a)) else DenseDelta(b @ a)


def low_rank_is_smaller(site: SiteSpec, rank: int) -> bool:
    """Whether factors of this rank take less memory than a matrix of the module's size."""
    return rank * (site.in_features + site.out_features) < site.in_features * site.out_features
