"""FourierFT in PEFT's format: a few coefficients of the Fourier transform of a change of weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Change, Factors, low_rank_is_smaller
from deltamux.adapters.peft.drawn_places import DrawnPlaces, read_places
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.patterns import ONCE_ENDS
from deltamux.adapters.peft.per_module import PerModule, as_scale, read_frequencies
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_SPECTRUM = "fourierft_spectrum"

_HARMLESS = ("fan_in_fan_out", "init_weights")


class Fourierft(ModuleFamily):
    """A coefficient makes a matrix of rank 2, so that more than a few make a dense one."""

    name = "fourierft"
    peft_types = ("FOURIERFT",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            return _Fourierft(
                read_targets(fields, "fourier_only"),
                Names((_SPECTRUM,)),
                read_places(fields),
                read_frequencies(fields, ONCE_ENDS),
                as_scale("scaling", fields.take("scaling", 150.0)),
            )


@dataclass(frozen=True, eq=False)
class _Fourierft(LowRankTuner):
    places: DrawnPlaces
    counts: PerModule[int]
    scale: float

    @property
    def tables(self) -> Sequence[PerModule[Any]]:
        return (self.counts,)

    def change(self, site: SiteSpec, given: Given) -> Change:
        shape = (self.counts.of(site.name),)
        values = given.modules.take_shaped(site, _SPECTRUM, shape) * self.scale
        places = self.places.of(site, len(values))
        if low_rank_is_smaller(site, 2 * len(values)):
            return _waves(site, places, values / (site.in_features * site.out_features))
        spectrum = torch.zeros(site.out_features, site.in_features)
        spectrum[places] = values
        delta: Tensor = torch.fft.ifft2(spectrum).real
        return delta


def _waves(site: SiteSpec, places: tuple[Tensor, Tensor], values: Tensor) -> Factors:
    """The sum of values cos(p + q), p along the rows and q along the columns, as a product."""
    p, q = (
        2 * math.pi * torch.outer(place.double(), torch.arange(size).double()) / size
        for place, size in zip(places, (site.out_features, site.in_features), strict=True)
    )
    a, b = torch.cat((q.cos(), q.sin())), torch.cat((p.cos(), -p.sin()))
    return a.float(), (b.T * values.double().repeat(2)).float()
