"""UniLoRA in PEFT's format: every number of every A and B is one of a few trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import as_rank
from deltamux.adapters.peft.seeds import as_kept, as_seed
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_THETA = "unilora_theta_d"
_INDICES = (_INDICES_A, _INDICES_B) = ("unilora_indices_A", "unilora_indices_B")
_SCALES = (_SCALES_A, _SCALES_B) = ("unilora_scales_A", "unilora_scales_B")

_HARMLESS = ("fan_in_fan_out", "init_theta_d_bound", "init_weights", "unilora_dropout")

_MAX_LENGTH = 1 << 24


class UniLora(ModuleFamily):
    """Which one, the file says, or the seed and the order of the modules in the model."""

    name = "unilora"
    peft_types = ("UNILORA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            saved = fields.take_bool("save_indices")
            return _UniLora(
                read_targets(fields, "unilora_only"),
                Names(
                    (*_INDICES, *_SCALES) if saved else (),
                    integers=_INDICES if saved else (),
                    shared=(_THETA,),
                ),
                as_rank("r", fields.take("r")),
                as_integer("theta_d_length", fields.take("theta_d_length"), 1, _MAX_LENGTH),
                as_seed("proj_seed", fields.take("proj_seed")),
            )


@dataclass(frozen=True, eq=False)
class _UniLora(LowRankTuner):
    rank: int
    length: int
    seed: int

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        """The trained numbers and, unless the file says it, which of them each module has."""
        theta = modules.take_shared(_THETA, (self.length,))
        if self.names.parts:
            return (theta,)
        shapes = [shape for site in sites for shape in self._shapes(site)]
        sizes = [rows * columns for rows, columns in shapes]
        drawn = _places(sum(sizes), self.length, self.seed)
        counts = torch.bincount(drawn, minlength=self.length).float()
        scales = torch.where(counts > 0, counts.rsqrt(), torch.zeros(()))
        pieces = zip(torch.split(drawn, sizes), shapes, strict=True)
        return (theta, scales, *(piece.view(shape) for piece, shape in pieces))

    def change(self, site: SiteSpec, given: Given) -> Factors:
        if self.names.parts:
            shape_a, shape_b = self._shapes(site)
            return (
                self._saved(site, given, _INDICES_A, _SCALES_A, shape_a),
                self._saved(site, given, _INDICES_B, _SCALES_B, shape_b),
            )
        theta, scales, *pieces = given.shared
        place = 2 * given.places[site.name]
        numbers = theta * as_kept(scales, site, given.structure)
        return numbers[pieces[place]], numbers[pieces[place + 1]]

    def _shapes(self, site: SiteSpec) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.rank, site.in_features), (site.out_features, self.rank)

    def _saved(
        self, site: SiteSpec, given: Given, indices: str, scales: str, shape: tuple[int, int]
    ) -> Tensor:
        places = given.modules.take(site.name, indices, 2).long()
        if places.shape != shape or places.min() < 0 or places.max() >= self.length:
            raise other_base(site, f"{indices} of {tuple(places.shape)} up to {places.max()}")
        return given.shared[0][places] * given.modules.take_shaped(site, scales, shape)


def _places(count: int, length: int, seed: int) -> Tensor:
    """What PEFT draws with numpy: each of `length` places as often as any other, or once more."""
    generator = np.random.default_rng(seed)
    places = np.repeat(np.arange(length), count // length)
    if count % length:
        more = generator.choice(length, size=count % length, replace=False)
        places = np.concatenate([places, more])
    generator.shuffle(places)
    return torch.as_tensor(places, dtype=torch.long)
