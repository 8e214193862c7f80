"""Places in a weight matrix that PEFT draws from a seed and does not save."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.seeds import as_seed
from deltamux.base.structure import SiteSpec


class DrawnPlaces:
    """The first places of a permutation of all, which modules of one size share."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._permutations: dict[int, Tensor] = {}

    def of(self, site: SiteSpec, number: int) -> tuple[Tensor, Tensor]:
        """Rows and columns [number] of a module's weight [out, in]."""
        elements = site.in_features * site.out_features
        if number > elements:
            raise other_base(site, f"{number} coefficients")
        if elements not in self._permutations:
            generator = torch.Generator().manual_seed(self._seed)
            self._permutations[elements] = torch.randperm(elements, generator=generator)
        places = self._permutations[elements][:number]
        return places // site.in_features, places % site.in_features


def read_places(fields: Fields) -> DrawnPlaces:
    """Takes random_loc_seed."""
    return DrawnPlaces(as_seed("random_loc_seed", fields.take("random_loc_seed", 777)))
