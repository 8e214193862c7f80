"""AdaLoRA in PEFT's format: y += s (x (E A)^T) B^T, at the ranks that training left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, refuse_field
from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.lora_config import HARMLESS, UNSERVED
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import as_rank, as_scale
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec
from deltamux.errors import InvalidArgument

_A, _B, _E = "lora_A", "lora_B", "lora_E"

# How ranks were given out in training; `r` is LoRA's, which AdaLoRA does not read.
_HARMLESS = (
    *HARMLESS,
    *("beta1", "beta2", "deltaT", "init_lora_weights", "orth_reg_weight", "r", "target_r"),
    *("tfinal", "tinit", "total_step"),
)

# Variants of LoRA, which PEFT does not combine with AdaLoRA.
_UNSERVED: Mapping[str, Json] = {
    **UNSERVED,
    "alora_invocation_tokens": None,
    **dict.fromkeys(("alpha_pattern", "kasa_config", "loftq_config", "trainable_token_indices")),
    **dict.fromkeys(("ensure_weight_tying", "lora_bias", "use_dora", "use_rslora"), False),
    "use_bdlora": None,
}

# What PEFT adds to the rank that it divides by.
_EPSILON = 1e-5


class AdaLora(ModuleFamily):
    """The scale is lora_alpha / init_r whatever the ranks became."""

    name = "adalora"
    peft_types = ("ADALORA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            fields.require_off(_UNSERVED)
            first_rank = as_rank("init_r", fields.take("init_r"))
            return _AdaLora(
                read_targets(fields, "lora_only"),
                Names((_A, _B, _E)),
                first_rank,
                _ranks(fields, first_rank),
                as_scale("lora_alpha", fields.take("lora_alpha")),
            )


@dataclass(frozen=True, eq=False)
class _AdaLora(LowRankTuner):
    first_rank: int
    # Of modules whose rank was cut.
    ranks: Mapping[str, int]
    alpha: float

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        if strange := self.ranks.keys() - {site.name for site in sites}:
            message = f"{CONFIG}: rank_pattern names {quoted(min(strange))}, which is no target"
            raise InvalidArgument(message, reason="BAD_FIELD", field="rank_pattern")
        return ()

    def change(self, site: SiteSpec, given: Given) -> Factors:
        rank = self.ranks.get(site.name, self.first_rank)
        a = given.modules.take_shaped(site, _A, (rank, site.in_features))
        b = given.modules.take_shaped(site, _B, (site.out_features, rank))
        e = given.modules.take_shaped(site, _E, (rank, 1))
        return a * e, b * (self.alpha / (self.first_rank + _EPSILON))


def _ranks(fields: Fields, first_rank: int) -> Mapping[str, int]:
    """rank_pattern holds a list for each E: which of its numbers were kept."""
    ranks = {}
    for name, kept in fields.take_table("rank_pattern").items():
        module, _, part = name.rpartition(".")
        whole = isinstance(kept, list) and all(isinstance(k, bool) for k in kept)
        if part != _E or not isinstance(kept, list) or not whole or len(kept) != first_rank:
            refuse_field(
                f"rank_pattern[{quoted(name)}]", kept, f"{first_rank} booleans for an {_E}"
            )
        ranks[module] = kept.count(True)
    return ranks
