"""LoHa in PEFT's format: the product of two low-rank deltas, number by number."""

from __future__ import annotations

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Change, low_rank_is_smaller
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import read_ranks, read_scales
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, ScaledTuner, Tuner
from deltamux.base.structure import SiteSpec

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

# Dropout, the first draw, and what convolutions do.
_HARMLESS = ("init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d")


class LoHa(ModuleFamily):
    """Two factors of rank r make a delta of rank r^2."""

    name = "loha"
    peft_types = ("LOHA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            ranks, alphas = read_ranks(fields), read_scales(fields, "alpha")
            return _LoHa(read_targets(fields), Names(_PARTS), ranks, alphas)


class _LoHa(ScaledTuner):
    def change(self, site: SiteSpec, given: Given) -> Change:
        rank, scale = self.rank_and_scale(site)
        tall, wide = (site.out_features, rank), (rank, site.in_features)
        shapes = zip(_PARTS, (tall, wide, tall, wide), strict=True)
        b1, a1, b2, a2 = (given.modules.take_shaped(site, part, shape) for part, shape in shapes)
        if not low_rank_is_smaller(site, rank * rank):
            return scale * (b1 @ a1) * (b2 @ a2)
        a = (a1[:, None] * a2).reshape(rank * rank, -1)
        b = (b1[:, :, None] * b2[:, None]).reshape(-1, rank * rank)
        return a, scale * b
