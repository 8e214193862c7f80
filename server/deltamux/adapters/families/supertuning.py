"""Super-Tuning in PEFT's format: a few numbers of each weight matrix, and perhaps LoRA beside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deltamux.adapters.checkpoint.fields import as_number, refuse_field, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import as_rank, as_scale
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.sparse_delta import SparseDelta
from deltamux.base.structure import SiteSpec

_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"

# How numbers were first drawn and places chosen; both are in the file.
_HARMLESS = ("init_weights", "lora_dropout", "select_top")


class Supertuning(ModuleFamily):
    """Places are counted along the rows of the weight."""

    name = "supertuning"
    peft_types = ("SUPERTUNING",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            if not fields.take_bool("save_precomputed_indices", True):
                raise unsupported("Super-Tuning whose places are not in the file")
            sparsity = fields.take("sparsity", 0.99)
            if sparsity not in (0, 0.0):
                sparsity = as_number("sparsity", sparsity, 1)
            rank, alpha = fields.take("r"), fields.take("lora_alpha")
            if rank is None and alpha is not None:
                refuse_field("lora_alpha", alpha, "missing where r is")
            rank = 0 if rank is None else as_rank("r", rank)
            alpha = 2.0 * rank if alpha is None else as_scale("lora_alpha", alpha)
            scale = alpha / rank if rank else 0.0
            names = Names((_VALUES, _PLACES, _A, _B), integers=(_PLACES,))
            return _Supertuning(read_targets(fields), names, float(sparsity), rank, scale)


@dataclass(frozen=True, eq=False)
class _Supertuning(Tuner):
    sparsity: float
    # Of LoRA; 0 without.
    rank: int
    scale: float

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        yield self._sparse(site, given.modules)
        if self.rank:
            a = given.modules.take_shaped(site, _A, (self.rank, site.in_features))
            b = given.modules.take_shaped(site, _B, (site.out_features, self.rank))
            yield LowRank(a, (b * self.scale).T)

    def _sparse(self, site: SiteSpec, modules: ModuleTensors) -> SparseDelta:
        elements = site.in_features * site.out_features
        shape = (int(elements * (1 - self.sparsity)),)
        values = modules.take_shaped(site, _VALUES, shape)
        places = modules.take(site.name, _PLACES, 1).long()
        if places.shape != shape or places.min() < 0 or places.max() >= elements:
            raise other_base(site, f"{_PLACES} of {tuple(places.shape)} up to {places.max()}")
        rows, columns = places // site.in_features, places % site.in_features
        return SparseDelta.of(rows, columns, values, site.out_features)
