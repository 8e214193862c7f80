"""GLoRA in PEFT's format: a weight scaled and shifted, and a bias that follows both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import as_rank
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.dense import DenseDelta
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.adapters.primitives.row_scale import RowScale
from deltamux.base.structure import SiteSpec

# PEFT's names of the five paths, and the parts that each may have; a path that is off has zeros.
_PARTS = tuple(f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X"))
_ZEROS = tuple(f"glora_{path}.zeros" for path in "ABCDE")

# Dividing by less would lose the shift in rounding.
_LEAST_SCALE = 0.01


class Glora(ModuleFamily):
    """W becomes W + W * A + B; a bias b becomes b + b * D + E + W C, all products elementwise but
    the last. A base without a bias has no C, D and E."""

    name = "glora"
    peft_types = ("GLORA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, ("init_weights",)) as fields:
            fields.require_off({"bias": "none"})
            return _Glora(
                read_targets(fields),
                Names(_PARTS + _ZEROS),
                as_rank("r", fields.take("r", 8)),
                _kind(fields, "config_A_B", ("lora", "vector", "constant", "none")),
                _kind(fields, "config_C", ("lora", "vector", "none")),
                _kind(fields, "config_D_E", ("constant", "vector", "none")),
            )


@dataclass(frozen=True, eq=False)
class _Glora(Tuner):
    rank: int
    # Of the paths A and B, C, D and E: "lora", "vector", "constant" or "none".
    weight: str
    input: str
    bias: str

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        for part in _ZEROS:
            modules.drop_idle(part, lambda zeros: not zeros.any())
        return ()

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        weight, bias = given.structure.host_weight(site.name), given.structure.host_bias(site.name)
        paths = _Paths(site, given.modules, self.rank)
        yield from _weight_payloads(site, paths, weight, self.weight)
        if bias is None:
            return
        change = torch.zeros(site.out_features)
        if self.input != "none":
            change = weight @ paths.take("C", self.input, (site.in_features, 1)).flatten()
        if self.bias != "none":
            scale, shift = (paths.take_vector(path, self.bias) for path in "DE")
            change = change + bias * scale + shift
        yield RowBias(change)


def _kind(fields: Fields, name: str, kinds: tuple[str, ...]) -> str:
    """One of `kinds`, the first by default."""
    kind = fields.take(name, kinds[0])
    if not isinstance(kind, str) or kind not in kinds:
        refuse_field(name, kind, " or ".join(kinds))
    return kind


def _weight_payloads(site: SiteSpec, paths: _Paths, weight: Tensor, kind: str) -> Iterable[Payload]:
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
