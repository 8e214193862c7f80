"""VeRA in AdapterHub's format: A and B are those of all modules, what they meet a module's own."""

from __future__ import annotations

from deltamux.adapters.adapterhub.linears import Given, LinearMethod, Read
from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.base.structure import SiteSpec


class AdapterHubVera(LinearMethod):
    """Unlike PEFT's, D [r, r] and B' [out, out] are whole matrices: the change is B' B D A."""

    name = "vera"

    def reader(self, given: Given) -> Read:
        # What the two matrices held on their diagonals before training.
        given.fields.discard(("vera_b", "vera_d"))
        first, rank = given.sites[0], given.rank
        sizes = {(site.in_features, site.out_features) for site in given.sites}
        if len(sizes) > 1:
            raise unsupported("VeRA of AdapterHub at modules of unlike sizes, which it fails at,")
        a, b = given.factors(first, f"shared_parameters.{given.name}")

        def read(site: SiteSpec, key: str) -> tuple[LowRank]:
            d = given.tensors.take(f"{key}.vera_D", rank, rank)
            mixed = given.tensors.take(f"{key}.vera_B", site.out_features, site.out_features)
            return (LowRank(d @ a, (mixed @ b).T * given.scaling),)

        return read
