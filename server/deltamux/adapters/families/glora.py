"""GLoRA in PEFT's format: a weight scaled and shifted, and a bias that follows both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.peft.module_family import parse_modules
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.per_module import as_rank
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import Targets, read_targets
from deltamux.adapters.primitives.dense import DenseDelta
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.adapters.primitives.row_scale import RowScale
from deltamux.base.structure import SiteSpec, Structure

# PEFT's names of the five paths, and the parts that each may have; a path that is off has zeros.
_PARTS = tuple(f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X"))
_ZEROS = tuple(f"glora_{path}.zeros" for path in "ABCDE")

# Dividing by less would lose the shift in rounding.
_LEAST_SCALE = 0.01


class Glora:
    """W becomes W + W * A + B; a bias b becomes b + b * D + E + W C, all products elementwise but
    the last. A base without a bias has no C, D and E."""

    name = "glora"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "GLORA"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        config = _read_config(manifest.fields)
        modules = ModuleTensors(tensors, structure, {part: part for part in _PARTS + _ZEROS})
        for part in _ZEROS:
            modules.drop_idle(part, lambda zeros: not zeros.any())

        def read(site: SiteSpec) -> list[Payload]:
            weight, bias = structure.host_weight(site.name), structure.bias(site.name)
            paths = _Paths(site, modules, config.rank)
            payloads = list(_weight_payloads(site, paths, weight, config.weight))
            if bias is not None:
                change = torch.zeros(site.out_features)
                if config.input != "none":
                    change = weight @ paths.take("C", config.input, (site.in_features, 1)).flatten()
                if config.bias != "none":
                    scale, shift = (paths.take_vector(path, config.bias) for path in "DE")
                    change = change + bias.detach().float().cpu() * scale + shift
                payloads.append(RowBias(change))
            return payloads

        sites = config.targets.sites(structure)
        return parse_modules(config.targets, sites, modules, structure, dtype, read)


@dataclass(frozen=True, eq=False)
class _Config:
    targets: Targets
    rank: int
    # Of the paths A and B, C, D and E: "lora", "vector", "constant" or "none".
    weight: str
    input: str
    bias: str


def _read_config(values: Mapping[str, Json]) -> _Config:
    with tuner_fields(values, ("init_weights",)) as fields:
        fields.require_off({"bias": "none"})
        return _Config(
            targets=read_targets(fields),
            rank=as_rank("r", fields.take("r", 8)),
            weight=_kind(fields, "config_A_B", ("lora", "vector", "constant", "none")),
            input=_kind(fields, "config_C", ("lora", "vector", "none")),
            bias=_kind(fields, "config_D_E", ("constant", "vector", "none")),
        )


def _kind(fields: Fields, name: str, kinds: tuple[str, ...]) -> str:
    """One of `kinds`, the first by default."""
    kind = fields.take(name, kinds[0])
    if not isinstance(kind, str) or kind not in kinds:
        refuse_field(name, kind, " or ".join(kinds))
    return kind


def _weight_payloads(site: SiteSpec, paths: _Paths, weight: Tensor, kind: str) -> Iterator[Payload]:
    if kind == "none":
        return
    scale, shift = (paths.take(path, kind, (site.out_features, site.in_features)) for path in "AB")
    if kind == "lora" or (1 + scale).abs().min() < _LEAST_SCALE:
        yield DenseDelta(weight * scale + shift)
        return
    # One number a row: the scale acts behind the shift, which is the same for all columns.
    scale = (1 + scale).flatten().expand(site.out_features)
    yield LowRank(torch.ones(1, site.in_features), (shift.flatten() / scale)[None])
    yield RowScale(scale)


@dataclass(frozen=True)
class _Paths:
    """The tensors of one module."""

    site: SiteSpec
    modules: ModuleTensors
    rank: int

    def take(self, path: str, kind: str, shape: tuple[int, int]) -> Tensor:
        """A matrix, or what is as good as one of `shape` in a sum or product."""
        if kind == "lora":
            down = self._take(path, "Xd", (shape[0], self.rank))
            return down @ self._take(path, "Xu", (self.rank, shape[1]))
        return self._take(path, "X", (1,) if kind == "constant" else (shape[0], 1))

    def take_vector(self, path: str, kind: str) -> Tensor:
        return self._take(path, "X", (1,) if kind == "constant" else (self.site.out_features,))

    def _take(self, path: str, part: str, shape: tuple[int, ...]) -> Tensor:
        return self.modules.take_shaped(self.site, f"glora_{path}.{part}", shape)
