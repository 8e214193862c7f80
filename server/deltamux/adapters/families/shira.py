"""SHiRA in PEFT's format: a few numbers of each weight matrix, trained where they stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deltamux.adapters.checkpoint.fields import as_integer
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.sparse_delta import SparseDelta
from deltamux.base.structure import SiteSpec
from deltamux.errors import InvalidArgument

_VALUES, _INDICES = "shira_weight", "shira_indices"

# How places and numbers were first drawn; both are in the file.
_HARMLESS = ("fan_in_fan_out", "init_weights", "mask_type", "random_seed")

_MAX_RANK = (1 << 31) - 1


class Shira(ModuleFamily):
    """A module of n inputs and m outputs has r (m + n) numbers, as many as LoRA of rank r."""

    name = "shira"
    peft_types = ("SHIRA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            rank = as_integer("r", fields.take("r"), 1, _MAX_RANK)
            names = Names((_VALUES, _INDICES), integers=(_INDICES,))
            return _Shira(read_targets(fields), names, rank)


@dataclass(frozen=True, eq=False)
class _Shira(Tuner):
    rank: int

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        values = given.modules.take(site.name, _VALUES, 1).float()
        indices = given.modules.take(site.name, _INDICES, 2)
        expected = self.rank * (site.in_features + site.out_features)
        if values.shape[0] != expected or indices.shape != (2, expected):
            raise InvalidArgument(
                f"{site.name}: {_VALUES} of {tuple(values.shape)} and {_INDICES} of "
                f"{tuple(indices.shape)}, where r = {self.rank} makes {expected} numbers",
                reason="RANK_MISMATCH",
            )
        rows, columns = indices.long()
        inside = rows.max() < site.out_features and columns.max() < site.in_features
        if indices.min() < 0 or not inside:
            raise other_base(site, f"{_INDICES} up to ({rows.max()}, {columns.max()})")
        yield SparseDelta.of(rows, columns, values, site.out_features)
