"""DeLoRA in PEFT's format: a low-rank delta whose every rank-1 part has a bounded norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import PerModule, read_ranks
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_A, _B, _BOUND, _NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"

# The bounds are in the file as training left them.
_HARMLESS = ("delora_lambda", "init_weights", "lambda_pattern", "module_dropout")

# PEFT divides by no smaller norm.
_LEAST_NORM = 1e-4


class DeLora(ModuleFamily):
    """y += B diag(bound / (r |a_i| |b_i|)) A (norms x); the norms are of the base's columns."""

    name = "delora"
    peft_types = ("DELORA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            ranks = read_ranks(fields)
            targets = read_targets(fields, "delora_only")
            return _DeLora(targets, Names((_A, _B, _BOUND, _NORMS)), ranks)


@dataclass(frozen=True, eq=False)
class _DeLora(LowRankTuner):
    ranks: PerModule[int]

    @property
    def tables(self) -> Sequence[PerModule[Any]]:
        return (self.ranks,)

    def change(self, site: SiteSpec, given: Given) -> Factors:
        modules, rank = given.modules, self.ranks.of(site.name)
        a = modules.take_shaped(site, _A, (rank, site.in_features))
        b = modules.take_shaped(site, _B, (site.out_features, rank))
        bound = modules.take_shaped(site, _BOUND, (1,))
        norms = modules.take_shaped(site, _NORMS, (site.in_features,))
        lengths = a.norm(dim=1).clamp(min=_LEAST_NORM) * b.norm(dim=0).clamp(min=_LEAST_NORM)
        return a * norms, b * (bound / rank / lengths)
