"""Tuners that change linear modules by a low-rank product, and perhaps their biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.adapters.family import Parsed
from deltamux.adapters.fields import Fields
from deltamux.adapters.module_tensors import ModuleTensors, other_base, to_serving
from deltamux.adapters.patterns import Selector
from deltamux.adapters.per_module import PerModule, require_served_rank
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.adapters.targets import read_selector, targeted_sites
from deltamux.adapters.trained_biases import Trained, read_trained_biases, take_bias_shifts
from deltamux.base.structure import Kind, SiteSpec, Structure

_KINDS: frozenset[Kind] = frozenset(("linear", "head"))

# a [rank, in] and b [out, rank], float32, with all scales folded in: y += (x a^T) b^T.
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Targets:
    """The modules that a tuner changes and the biases that it trained."""

    selector: Selector
    trained_biases: Trained = "none"

    def sites(self, structure: Structure, tables: Iterable[PerModule[Any]] = ()) -> list[SiteSpec]:
        """The targeted sites; every key of `tables` has to mean one of them."""
        sites = targeted_sites(self.selector, structure, _KINDS)
        for table in tables:
            table.require_used([site.name for site in sites])
        return sites


def read_targets(fields: Fields, biases: str | None = None) -> Targets:
    """Takes the fields that select modules, and `bias` where the tuner has it.

    `biases` is what the tuner calls the biases of its targets alone ("vera_only").
    """
    trained: Trained = "none"
    if biases is not None:
        trained = read_trained_biases(fields.take("bias"), biases)
    return Targets(read_selector(fields), trained)


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
    sites = list(sites)
    shifts = take_bias_shifts(targets.trained_biases, sites, modules, structure)
    notes = modules.drop_base_copies()
    payloads: dict[str, tuple[Payload, ...]] = {}
    rank = 0
    for site in sites:
        a, b = factors(site)
        if a.shape[0]:
            payloads[site.name] = (low_rank(site, a, b, dtype),)
            rank = max(rank, a.shape[0])
    for name, shift in shifts.items():
        bias = RowBias(to_serving(structure.sites[name], shift, dtype))
        payloads[name] = (*payloads.get(name, ()), bias)
    modules.require_none_left()
    return Parsed(payloads, rank, modules.taken, notes)


def low_rank(site: SiteSpec, a: Tensor, b: Tensor, dtype: torch.dtype) -> LowRank:
    """The payload of `a` [rank, in] and `b` [out, rank], rounded once."""
    if (a.shape[1], b.shape[0]) != (site.in_features, site.out_features):
        raise other_base(site, f"factors of {tuple(b.shape)} and {tuple(a.shape)}")
    require_served_rank(f"the rank of {site.name}", a.shape[0])
    return LowRank(to_serving(site, a, dtype), to_serving(site, b.T, dtype))
