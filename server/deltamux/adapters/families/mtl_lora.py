"""MTL-LoRA in AdapterHub's format: what tasks share, and what one of them makes of it."""

from __future__ import annotations

from deltamux.adapters.adapterhub.linears import Given, LinearMethod, Read
from deltamux.adapters.checkpoint.fields import as_integer, as_number, unsupported
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.base.structure import SiteSpec

_MAX_UPS = 1 << 10


class MtlLora(LinearMethod):
    """An adapter is one task's: diag(v) between A and the mean of all B, by the task's weights."""

    name = "mtl_lora"

    def reader(self, given: Given) -> Read:
        ups = as_integer("n_up_projection", given.fields.take("n_up_projection"), 1, _MAX_UPS)
        sharpness = as_number("weights_sharpness", given.fields.take("weights_sharpness"), 1e6)
        between = given.fields.take("task_specific_matrix_type")
        if between != "singular_values":
            raise unsupported(f"task_specific_matrix_type = {quoted(between)}")
        rank, take = given.rank, given.tensors.take

        def read(site: SiteSpec, key: str) -> tuple[LowRank]:
            a = take(f"{key}.lora_A", rank, site.in_features)
            b = take(f"{key}.lora_B", ups, site.out_features, rank)
            weights = (take(f"{key}.weights", ups) / sharpness).softmax(dim=0)
            a = take(f"{key}.task_specific.values", rank)[:, None] * a
            return (LowRank(a, (weights[:, None, None] * b).sum(0).T * given.scaling),)

        return read
