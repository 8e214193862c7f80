"""WaveFT in PEFT's format: a few coefficients of the wavelet transform of a change of weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.adapters.peft.drawn_places import DrawnPlaces, read_places
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import PerModule, as_scale, read_frequencies
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.sparse_delta import SparseDelta
from deltamux.base.structure import SiteSpec

_SPECTRUM = "waveft_spectrum"

_HARMLESS = ("fan_in_fan_out", "init_weights")


class Waveft(ModuleFamily):
    """A coefficient of Haar's wavelet ("db1") makes four numbers; other wavelets make many more."""

    name = "waveft"
    peft_types = ("WAVEFT",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            wavelet = fields.take("wavelet_family", "db1")
            transforms = fields.take_bool("use_idwt", True)
            if transforms and wavelet != "db1":
                raise unsupported(f"wavelet_family = {quoted(wavelet)}, whose filters it lacks,")
            return _Waveft(
                read_targets(fields, "waveft_only"),
                Names((_SPECTRUM,)),
                read_places(fields),
                read_frequencies(fields),
                fields.take_bool("proportional_parameters"),
                as_scale("scaling", fields.take("scaling", 25.0)),
                transforms,
            )


@dataclass(frozen=True, eq=False)
class _Waveft(Tuner):
    places: DrawnPlaces
    # Of the coefficients of each module, or on average where they follow the modules' sizes.
    numbers: PerModule[int]
    proportional: bool
    scale: float
    # Whether what was trained are coefficients, not the numbers themselves.
    transforms: bool

    @property
    def tables(self) -> Sequence[PerModule[Any]]:
        return (self.numbers,)

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        number = self._number(site, given.sites)
        values = given.modules.take_shaped(site, _SPECTRUM, (number,)) * self.scale
        rows, columns = self.places.of(site, number)
        if self.transforms:
            rows, columns, values = _haar(site, rows, columns, values)
        yield _sparse(site, rows, columns, values)

    def _number(self, site: SiteSpec, sites: Sequence[SiteSpec]) -> int:
        """How many coefficients a module has, which is one of `sites`."""
        if not self.proportional:
            return self.numbers.of(site.name)
        share = _elements(site) / sum(map(_elements, sites))
        return max(1, round(share * (self.numbers.default * len(sites))))


def _elements(site: SiteSpec) -> int:
    return site.in_features * site.out_features


def _haar(
    site: SiteSpec, rows: Tensor, columns: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers that each coefficient makes: half of it at four places, in two of them less."""
    half_rows, half_columns = -(-site.out_features // 2), -(-site.in_features // 2)
    detail_rows, detail_columns = rows // half_rows, columns // half_columns
    found = []
    for i in (0, 1):
        for j in (0, 1):
            sign = 1 - 2 * ((i * detail_columns + j * detail_rows) % 2)
            found.append(
                (rows % half_rows * 2 + i, columns % half_columns * 2 + j, values * sign / 2)
            )
    made_rows, made_columns, made = (torch.cat(parts) for parts in zip(*found, strict=True))
    inside = (made_rows < site.out_features) & (made_columns < site.in_features)
    return made_rows[inside], made_columns[inside], made[inside]


def _sparse(site: SiteSpec, rows: Tensor, columns: Tensor, values: Tensor) -> SparseDelta:
    """With one number at each place."""
    places, inverse = torch.unique(rows * site.in_features + columns, return_inverse=True)
    summed = torch.zeros(len(places)).index_add(0, inverse, values)
    rows, columns = places // site.in_features, places % site.in_features
    return SparseDelta.of(rows, columns, summed, site.out_features)
