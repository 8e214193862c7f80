"""DEFT and PaRa in PEFT's format: a subspace of the weight is taken out and another put in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltamux.adapters.checkpoint.fields import refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import as_rank, as_scale
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_P, _R = "deft_P", "deft_R"

_HARMLESS = ("deft_dropout", "fan_in_fan_out", "init_scale", "init_weights")


class Deft(ModuleFamily):
    """W + Q (s R - K^T W), where Q and K come from P; without R (PaRa), nothing is put in."""

    name = "deft"
    peft_types = ("DEFT",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            method = fields.take("decomposition_method")
            if method not in ("relu", "qr"):
                refuse_field("decomposition_method", method, '"relu" or "qr"')
            rank, alpha = as_rank("r", fields.take("r")), fields.take("alpha")
            scale = 1.0 if not alpha else as_scale("alpha", alpha) / rank
            parts = (_P,) if fields.take_bool("para") else (_P, _R)
            targets = read_targets(fields, "deft_only")
            return _Deft(targets, Names(parts), rank, scale, method == "qr")


@dataclass(frozen=True, eq=False)
class _Deft(LowRankTuner):
    rank: int
    scale: float
    orthogonal: bool

    def change(self, site: SiteSpec, given: Given) -> Factors:
        p = given.modules.take_shaped(site, _P, (site.out_features, self.rank))
        q, k = (torch.linalg.qr(p)[0],) * 2 if self.orthogonal else (p, p.relu())
        a = -(k.T @ given.structure.host_weight(site.name))
        if _R in self.names.parts:
            a += self.scale * given.modules.take_shaped(site, _R, (self.rank, site.in_features))
        return a, q
