"""PEANuT in PEFT's format: a small network of the weight gives A, and B is plain."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.activations import ACT2FN

from deltamux.adapters.checkpoint.fields import as_integer, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import as_rank, as_scale
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_A, _B = "peanut_A.weight", "peanut_B.weight"

_MAX_DEPTH = 64


class Peanut(ModuleFamily):
    """The network is not linear in the weight, but what it adds is linear in the input."""

    name = "peanut"
    peft_types = ("PEANUT",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, ("init_weights",)) as fields:
            activation = fields.take("act_fn")
            if not isinstance(activation, str) or activation not in ACT2FN:
                refuse_field("act_fn", activation, "the name of an activation of transformers")
            depth = as_integer("depth", fields.take("depth") or 0, 0, _MAX_DEPTH)
            return _Peanut(
                read_targets(fields),
                Names((_A, _B, *_layers("encoders", depth), *_layers("decoders", depth))),
                as_rank("r", fields.take("r")),
                depth,
                activation,
                as_scale("scaling", fields.take("scaling")),
            )


def _layers(kind: str, depth: int) -> tuple[str, ...]:
    return tuple(f"peanut_{kind}.{index}.weight" for index in range(depth))


@dataclass(frozen=True, eq=False)
class _Peanut(LowRankTuner):
    rank: int
    depth: int
    activation: str
    scale: float

    def change(self, site: SiteSpec, given: Given) -> Factors:
        a = given.modules.take_shaped(site, _A, (self.rank, site.out_features))
        b = given.modules.take_shaped(site, _B, (site.out_features, self.rank))
        activate = ACT2FN[self.activation]
        hidden: Tensor = activate(given.structure.host_weight(site.name).T @ a.T)
        residuals = []
        for encoder in self._squares(site, given, "encoders"):
            residuals.append(hidden)
            hidden = activate(hidden @ encoder.T)
        for decoder in self._squares(site, given, "decoders"):
            hidden = activate(hidden @ decoder.T) + residuals.pop()
        return hidden.T, self.scale * b

    def _squares(self, site: SiteSpec, given: Given, kind: str) -> list[Tensor]:
        names, shape = _layers(kind, self.depth), (self.rank, self.rank)
        return [given.modules.take_shaped(site, name, shape) for name in names]
