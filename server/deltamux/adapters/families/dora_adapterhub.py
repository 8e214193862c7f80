"""DoRA in AdapterHub's format, whose magnitude is that of a module's whole output."""

from __future__ import annotations

from deltamux.adapters.adapterhub.linears import Given, LinearMethod, Read
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.row_scale import OutputScale
from deltamux.base.structure import SiteSpec


class AdapterHubDora(LinearMethod):
    """m / |W + B A| of each row; unlike PEFT's, it scales the bias, and the norm knows no alpha."""

    name = "dora"

    def reader(self, given: Given) -> Read:
        given.fields.discard(("use_dora",))

        def read(site: SiteSpec, key: str) -> tuple[LowRank, OutputScale]:
            a, b = given.factors(site, key)
            magnitude = given.tensors.take(f"{key}.m.weight", site.out_features, 1)
            norm = (given.structure.host_weight(site.name) + b @ a).norm(dim=1)
            return LowRank(a, b.T * given.scaling), OutputScale(magnitude[:, 0] / norm)

        return read
