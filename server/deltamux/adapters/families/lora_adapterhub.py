"""LoRA and IA3 in AdapterHub's format, which has one config for both."""

from __future__ import annotations

from deltamux.adapters.adapterhub.linears import Given, LinearMethod, Read
from deltamux.adapters.checkpoint.fields import refuse_field
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.row_scale import OutputScale
from deltamux.base.structure import SiteSpec


class AdapterHubLora(LinearMethod):
    """It adds a low rank."""

    name = "lora"

    def reader(self, given: Given) -> Read:
        def read(site: SiteSpec, key: str) -> tuple[LowRank]:
            a, b = given.factors(site, key)
            return (LowRank(a, b.T * given.scaling),)

        return read


class AdapterHubIa3(LinearMethod):
    """It scales a module's output with its bias."""

    name = "ia3"

    def reader(self, given: Given) -> Read:
        if given.rank != 1:
            refuse_field("r", given.rank, "1")

        def read(site: SiteSpec, key: str) -> tuple[OutputScale]:
            b = given.tensors.take(f"{key}.lora_B", site.out_features, 1)
            return (OutputScale(b[:, 0] * given.scaling),)

        return read
