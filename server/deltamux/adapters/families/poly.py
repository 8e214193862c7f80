"""Poly and MHR in PEFT's format: a mixture of LoRAs that each task weighs in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, as_integer, refuse_field, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import as_rank
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"

_MAX_COUNT = 1 << 10


class Poly(ModuleFamily):
    """A is the mixture of all skills' A, B that of their B: where there is one task, one low rank.

    With more of them PEFT wants a task id beside each prompt, which no request has.
    """

    name = "poly"
    peft_types = ("POLY",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, ("init_weights",)) as fields:
            tasks, kind = fields.take("n_tasks", 1), fields.take("poly_type", "poly")
            if tasks != 1:
                raise unsupported(
                    f"n_tasks = {tasks}: a request cannot name its task, so more than one"
                )
            if kind != "poly":
                refuse_field("poly_type", kind, '"poly"')
            return _Poly(
                read_targets(fields),
                Names((_A, _B, _LOGITS)),
                as_rank("r", fields.take("r", 8)),
                _count(fields, "n_skills", 4),
                _count(fields, "n_splits", 1),
            )


def _count(fields: Fields, name: str, default: int) -> int:
    return as_integer(name, fields.take(name, default), 1, _MAX_COUNT)


@dataclass(frozen=True, eq=False)
class _Poly(LowRankTuner):
    """A split is a share of a module's inputs and outputs, whose skills are weighed anew."""

    rank: int
    skills: int
    splits: int

    def change(self, site: SiteSpec, given: Given) -> Factors:
        if site.in_features % self.splits or site.out_features % self.splits:
            raise other_base(site, f"{self.splits} splits")
        share_in, share_out = (n // self.splits for n in (site.in_features, site.out_features))
        a = self._take(site, given, _A, (share_in, self.rank))
        b = self._take(site, given, _B, (self.rank, share_out))
        logits = given.modules.take_shaped(site, _LOGITS, (1, self.splits * self.skills))
        weights = logits.view(self.splits, self.skills).sigmoid()
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-12)
        a = torch.einsum("qs,qsdr->rqd", weights, a).reshape(self.rank, -1)
        b = torch.einsum("qs,qsrd->qdr", weights, b).reshape(-1, self.rank)
        return a, b / self.rank

    def _take(self, site: SiteSpec, given: Given, part: str, shape: Sequence[int]) -> Tensor:
        return given.modules.take_shaped(site, part, (self.splits, self.skills, *shape))
