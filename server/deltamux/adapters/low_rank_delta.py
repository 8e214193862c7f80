"""Tuners that change linear modules by a low-rank product, and perhaps their biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deltamux.adapters.family import Parsed
from deltamux.adapters.module_family import parse_modules
from deltamux.adapters.module_tensors import ModuleTensors, other_base, to_serving
from deltamux.adapters.per_module import require_served_rank
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.targets import Targets
from deltamux.base.structure import SiteSpec, Structure

# a [rank, in] and b [out, rank], float32, with all scales folded in: y += (x a^T) b^T.
Factors = tuple[Tensor, Tensor]


def parse_low_rank(
    targets: Targets,
    sites: Iterable[SiteSpec],
    modules: ModuleTensors,
    structure: Structure,
    dtype: torch.dtype,
    factors: Callable[[SiteSpec], Factors],
) -> Parsed:
    """Payloads of all sites from what `factors` makes of their tensors.

    Raises as Family.parse does; a rank above MAX_RANK is FailedPrecondition (RANK_TOO_LARGE).
    """

    def read(site: SiteSpec) -> list[Payload]:
        a, b = factors(site)
        return [low_rank(site, a, b, dtype)] if a.shape[0] else []

    return parse_modules(targets, sites, modules, structure, dtype, read)


def low_rank(site: SiteSpec, a: Tensor, b: Tensor, dtype: torch.dtype) -> LowRank:
    """The payload of `a` [rank, in] and `b` [out, rank], rounded once."""
    if (a.shape[1], b.shape[0]) != (site.in_features, site.out_features):
        raise other_base(site, f"factors of {tuple(b.shape)} and {tuple(a.shape)}")
    require_served_rank(f"the rank of {site.name}", a.shape[0])
    return LowRank(to_serving(site, a, dtype), to_serving(site, b.T, dtype))
