"""FRoD in PEFT's format: a weight in a basis that modules of one kind share, trained there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_number, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.dense import Dense
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec
from deltamux.errors import InvalidArgument

_DIAGONAL, _OTHERS = "frod_lambda_l", "frod_lambda_s_values"
_BASIS, _PLACES, _SIZE = "frod_V", "frod_s_indices", "frod_s_size"

# How the basis was made, which is in the file; fan_in_fan_out says what the base shows.
_HARMLESS = (
    "fan_in_fan_out",
    "frod_dropout",
    "init_weights",
    "progressbar",
    "projection_prng_key",
    "regularization_alpha",
    "runtime_offload_base_weight",
)

# Columns of the base in its basis that are shorter count as none, as PEFT decides it.
_LEAST_NORM = 1e-12


class Frod(ModuleFamily):
    """W = U diag(l) V^T with columns of length 1 in U; trained are l and a few numbers beside it.

    What comes of it takes the place of the weight.
    """

    name = "frod"
    peft_types = ("FROD",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            if not fields.take_bool("save_projection", True):
                raise unsupported("FRoD whose bases are not in the file")
            rate = fields.take("sparse_rate", 0.01)
            density = 0.0 if rate in (0, 0.0) else as_number("sparse_rate", rate, 1)
            targets = read_targets(fields, "frod_only")
            return _Frod(targets, Names((_DIAGONAL, _OTHERS)), density)


@dataclass(frozen=True, eq=False)
class _Frod(Tuner):
    density: float

    def names_at(self, sites: Sequence[SiteSpec]) -> Names:
        integers, bases = (
            tuple(f"{name}.{kind}" for name in names for kind in _widths(sites))
            for names in ((_PLACES, _SIZE), (_BASIS,))
        )
        return replace(self.names, integers=integers, shared=(*integers, *bases))

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        """Of each kind V [in, in] and the trained places off the diagonal, [2, number]."""
        widths = _widths(sites).items()
        return [part for kind, width in widths for part in self._basis(kind, width, modules)]

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        first = 2 * list(_widths(given.sites)).index(_kind(site.name))
        weight = _weight(site, given, *given.shared[first : first + 2])
        yield Dense(weight, given.structure.host_bias(site.name))

    def _basis(self, kind: str, width: int, modules: ModuleTensors) -> tuple[Tensor, Tensor]:
        number = min(int(width * width * self.density), width * (width - 1))
        if self.density and width > 1:
            number = max(number, 1)
        size = modules.take_shared(f"{_SIZE}.{kind}", (2,))
        places = modules.take_shared(f"{_PLACES}.{kind}", (2, number)).long()
        if size.tolist() != [width, width] or ((places < 0) | (places >= width)).any():
            message = f"{_PLACES}.{kind} lies outside a matrix of {width} rows"
            raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")
        matrix = modules.take_shared(f"{_BASIS}.{kind}", (width, width), trained=False)
        return matrix, places


def _widths(sites: Iterable[SiteSpec]) -> dict[str, int]:
    """Inputs of the modules of each kind."""
    return {_kind(site.name): site.in_features for site in sites}


def _kind(module: str) -> str:
    """What PEFT calls the modules that share a basis with this one."""
    *around, name = module.split(".")
    if not around or around[-1].isdigit():
        return name
    if name == "dense" and around[-2:] == ["attention", "output"]:
        return "attention_output"
    return f"{around[-1]}_{name}"


def _weight(site: SiteSpec, given: Given, basis: Tensor, places: Tensor) -> Tensor:
    if len(basis) != site.in_features:
        raise other_base(site, f"a basis of {tuple(basis.shape)}")
    core = torch.diag(given.modules.take_shaped(site, _DIAGONAL, (site.in_features,)))
    values = given.modules.take_shaped(site, _OTHERS, (places.shape[1],))
    core.index_put_(tuple(places), values, accumulate=True)
    return _directions(given.structure.host_weight(site.name), basis) @ core @ basis.T


def _directions(weight: Tensor, basis: Tensor) -> Tensor:
    """U [out, in]: the columns of the weight in the basis, of length 1; in float64 as in PEFT."""
    try:
        columns: Tensor = torch.linalg.solve(basis.double(), weight.double().T).T
    except RuntimeError:
        columns = weight.double() @ torch.linalg.pinv(basis.double(), rtol=1e-6).T
    norms = columns.norm(dim=0)
    return torch.where(norms > _LEAST_NORM, columns / norms, 0.0).float()
