"""OSF in PEFT's format: the least singular values and vectors of a weight, trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_U, _S, _V = (f"osf_svd_params.{part}_low" for part in "USV")

# How parts were first drawn, and how many each module keeps, which their tensors show.
_HARMLESS = ("effective_rank", "init_weights", "rank_pattern")


class Osf(ModuleFamily):
    """Half of all singular values are trained by default, which changes all of a weight."""

    name = "osf"
    peft_types = ("OSF",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            fields.require_off({"target_svd_config": None})
            return _Osf(read_targets(fields), Names((_U, _S, _V)))


@dataclass(frozen=True, eq=False)
class _Osf(LowRankTuner):
    def change(self, site: SiteSpec, given: Given) -> Factors:
        """What was trained less what it began with."""
        values = given.modules.take(site.name, _S, 1).float()
        if len(values) > min(site.in_features, site.out_features):
            raise other_base(site, f"{len(values)} singular values")
        left = given.modules.take_shaped(site, _U, (site.out_features, len(values)))
        right = given.modules.take_shaped(site, _V, (len(values), site.in_features))
        weight = given.structure.host_weight(site.name)
        first_left, first_values, first_right = torch.linalg.svd(weight, full_matrices=False)
        least = slice(len(first_values) - len(values), None)
        removed = -first_left[:, least] * first_values[least]
        return torch.cat((right, first_right[least])), torch.cat((left * values, removed), 1)
