"""C3A in PEFT's format: a change of weight whose blocks are circulant, saved as their kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_KERNELS = "c3a_kernel"

# How kernels were first drawn, and the size of blocks, which their tensors show.
_HARMLESS = ("block_size", "block_size_pattern", "init_weights")


class C3a(ModuleFamily):
    """Circulant blocks have full rank, so the change is a dense matrix."""

    name = "c3a"
    peft_types = ("C3A",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            return _C3a(read_targets(fields, "c3a_only"), Names((_KERNELS,)))


@dataclass(frozen=True, eq=False)
class _C3a(LowRankTuner):
    def change(self, site: SiteSpec, given: Given) -> Tensor:
        kernels = given.modules.take(site.name, _KERNELS, 3).float()
        return _circulant(kernels) / site.in_features


def _circulant(kernels: Tensor) -> Tensor:
    """The matrix [n size, m size] whose blocks C have C[i, j] = kernel[(j - i) mod size]."""
    places = torch.arange(kernels.shape[2])
    blocks = kernels[:, :, (places[None] - places[:, None]) % len(places)]
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)
