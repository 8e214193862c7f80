"""FRoD in PEFT's format: a weight in a basis that modules of one kind share, trained there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_number, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import parse_modules
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import Targets, read_targets
from deltamux.adapters.primitives.dense import Dense
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec, Structure
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


class Frod:
    """W = U diag(l) V^T with columns of length 1 in U; trained are l and a few numbers beside it.

    What comes of it takes the place of the weight.
    """

    name = "frod"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "FROD"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        config = _read_config(manifest.fields)
        sites = config.targets.sites(structure)
        widths = {_kind(site.name): site.in_features for site in sites}
        places, sizes = (tuple(f"{name}.{kind}" for kind in widths) for name in (_PLACES, _SIZE))
        modules = ModuleTensors(
            tensors,
            structure,
            {part: part for part in (_DIAGONAL, _OTHERS)},
            integers=(*places, *sizes),
            shared=(*places, *sizes, *(f"{_BASIS}.{kind}" for kind in widths)),
        )
        bases = {kind: config.take_basis(kind, width, modules) for kind, width in widths.items()}

        def read(site: SiteSpec) -> list[Payload]:
            weight = _weight(site, modules, structure, bases[_kind(site.name)])
            bias = structure.bias(site.name)
            return [Dense(weight, None if bias is None else bias.detach().float().cpu())]

        return parse_modules(config.targets, sites, modules, structure, dtype, read)


@dataclass(frozen=True, eq=False)
class _Basis:
    """V [in, in] and the places off the diagonal that were trained, [2, number]."""

    matrix: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class _Config:
    targets: Targets
    density: float

    def take_basis(self, kind: str, width: int, modules: ModuleTensors) -> _Basis:
        number = min(int(width * width * self.density), width * (width - 1))
        if self.density and width > 1:
            number = max(number, 1)
        size = modules.take_shared(f"{_SIZE}.{kind}", (2,))
        places = modules.take_shared(f"{_PLACES}.{kind}", (2, number)).long()
        if size.tolist() != [width, width] or ((places < 0) | (places >= width)).any():
            message = f"{_PLACES}.{kind} lies outside a matrix of {width} rows"
            raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")
        matrix = modules.take_shared(f"{_BASIS}.{kind}", (width, width), trained=False)
        return _Basis(matrix, places)


def _read_config(values: Mapping[str, Json]) -> _Config:
    with tuner_fields(values, _HARMLESS) as fields:
        if not fields.take_bool("save_projection", True):
            raise unsupported("FRoD whose bases are not in the file")
        rate = fields.take("sparse_rate", 0.01)
        density = 0.0 if rate in (0, 0.0) else as_number("sparse_rate", rate, 1)
        return _Config(read_targets(fields, "frod_only"), density)


def _kind(module: str) -> str:
    """What PEFT calls the modules that share a basis with this one."""
    *around, name = module.split(".")
    if not around or around[-1].isdigit():
        return name
    if name == "dense" and around[-2:] == ["attention", "output"]:
        return "attention_output"
    return f"{around[-1]}_{name}"


def _weight(site: SiteSpec, modules: ModuleTensors, structure: Structure, basis: _Basis) -> Tensor:
    if len(basis.matrix) != site.in_features:
        raise other_base(site, f"a basis of {tuple(basis.matrix.shape)}")
    core = torch.diag(modules.take_shaped(site, _DIAGONAL, (site.in_features,)))
    values = modules.take_shaped(site, _OTHERS, (basis.places.shape[1],))
    core.index_put_(tuple(basis.places), values, accumulate=True)
    return _directions(structure.host_weight(site.name), basis.matrix) @ core @ basis.matrix.T


def _directions(weight: Tensor, basis: Tensor) -> Tensor:
    """U [out, in]: the columns of the weight in the basis, of length 1; in float64 as in PEFT."""
    try:
        columns: Tensor = torch.linalg.solve(basis.double(), weight.double().T).T
    except RuntimeError:
        columns = weight.double() @ torch.linalg.pinv(basis.double(), rtol=1e-6).T
    norms = columns.norm(dim=0)
    return torch.where(norms > _LEAST_NORM, columns / norms, 0.0).float()
