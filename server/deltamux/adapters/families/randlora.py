"""RandLoRA in PEFT's format: random bases that all modules share, scaled for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import as_rank, as_scale
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import largest, read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_A, _B = "randlora_A", "randlora_B"
_BASIS_SCALES, _WIDTH_SCALES = "randlora_lambda", "randlora_gamma"

# How bases were drawn, which are in the file; fan_in_fan_out says what the base shows.
_HARMLESS = (
    "fan_in_fan_out",
    "init_weights",
    "projection_prng_key",
    "randlora_dropout",
    "sparse",
    "very_sparse",
)


class Randlora(ModuleFamily):
    """The bases together span all of a weight, so the change is a dense matrix."""

    name = "randlora"
    peft_types = ("RANDLORA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            if not fields.take_bool("save_projection", True):
                raise unsupported("RandLoRA whose random bases are not in the file")
            rank = as_rank("r", fields.take("r", 32))
            return _Randlora(
                read_targets(fields, "randlora_only"),
                Names((_A, _B, _BASIS_SCALES, _WIDTH_SCALES), shared=(_A, _B)),
                rank,
                as_scale("randlora_alpha", fields.take("randlora_alpha", 640)) / rank,
            )


@dataclass(frozen=True, eq=False)
class _Randlora(LowRankTuner):
    rank: int
    scale: float

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        """A [r, 1, least] and B [most, bases, r], of the size that all modules together need."""
        least, most = sorted(largest(sites))
        a = modules.take_shared(_A, (self.rank, 1, least), trained=False)
        b = modules.take_shared(_B, (most, self._bases(least), self.rank), trained=False)
        # PEFT saves the shared bases once more with each module.
        modules.drop_idle(_A, lambda copy: torch.equal(copy.float(), a))
        modules.drop_idle(_B, lambda copy: torch.equal(copy.float(), b))
        return a, b

    def change(self, site: SiteSpec, given: Given) -> Tensor:
        a, b = given.shared
        least, most = sorted((site.in_features, site.out_features))
        bases = self._bases(least)
        basis_scales = given.modules.take_shaped(site, _BASIS_SCALES, (self.rank, bases))
        width_scales = given.modules.take_shaped(site, _WIDTH_SCALES, (bases, least))
        scaled = a[:, :, :least] * basis_scales[:, :, None] * width_scales
        delta = b[:most, :bases].flatten(1) @ scaled.flatten(0, 1) * self.scale
        return delta if least == site.in_features else delta.T

    def _bases(self, width: int) -> int:
        return -(-width // self.rank)
