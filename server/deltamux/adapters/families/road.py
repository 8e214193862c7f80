"""RoAd in PEFT's format: the output of a module is rotated and scaled in pairs, with its bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.pair_rotation import PairRotation
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec

_ANGLES, _SCALES = "road_theta", "road_alpha"

# Trained angles, and as many scales, for each pair of features.
_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}

_MAX_GROUP = 1 << 20


class Road(ModuleFamily):
    """One angle a pair, one a feature, or two a feature."""

    name = "road"
    peft_types = ("ROAD",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, ("init_weights",)) as fields:
            variant = fields.take("variant", "road_1")
            if not isinstance(variant, str) or variant not in _VARIANTS:
                refuse_field("variant", variant, " or ".join(_VARIANTS))
            group = as_integer("group_size", fields.take("group_size", 64), 2, _MAX_GROUP)
            if group % 2:
                refuse_field("group_size", group, "an even number")
            names = Names((_ANGLES, _SCALES))
            return _Road(read_targets(fields), names, _VARIANTS[variant], group)


@dataclass(frozen=True, eq=False)
class _Road(Tuner):
    per_pair: int
    group: int

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        if site.out_features % self.group:
            raise other_base(site, f"groups of {self.group} features")
        shape = (site.out_features // 2 * self.per_pair,)
        angles, scales = (
            given.modules.take_shaped(site, part, shape) for part in (_ANGLES, _SCALES)
        )
        yield PairRotation(self._factors(angles, scales), self.group // 2)

    def _factors(self, angles: Tensor, scales: Tensor) -> Tensor:
        """Of each feature and of its partner, [2, out]."""
        half = self.group // 2
        own, other = scales * angles.cos(), scales * angles.sin()
        if self.per_pair == 1:
            own, other = (t.view(-1, 1, half).expand(-1, 2, half) for t in (own, other))
        elif self.per_pair == 2:
            own, other = (t.view(-1, 2, half) for t in (own, other))
        else:
            own, other = (t.view(-1, 2, 2, half)[:, i] for i, t in enumerate((own, other)))
        signed = torch.stack((-other[:, 0], other[:, 1]), 1)
        return torch.stack((own.reshape(-1), signed.reshape(-1)))
