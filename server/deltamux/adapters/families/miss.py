"""MiSS (once Bone) in PEFT's format: the input folded to r numbers, then one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltamux.adapters.checkpoint.fields import Fields, as_integer, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.low_rank_delta import Change, Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import as_rank
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_MAX_TILE = 1 << 20


class Miss(ModuleFamily):
    """Input feature i goes to the number i mod r; `init_weights` names the variant too."""

    name = "miss"
    peft_types = ("MISS", "BONE")

    def read(self, manifest: Manifest) -> Tuner:
        name, variants = (
            ("Bone", ("bat",)) if manifest.type == "BONE" else ("MiSS", ("bat", "mini"))
        )
        part = f"{name.lower()}_block"
        with tuner_fields(manifest.fields, ("miss_dropout",)) as fields:
            targets, rank = read_targets(fields, f"{name}_only"), as_rank("r", fields.take("r"))
            variant, tile = _variant(fields, variants), fields.take("mini_r")
            if variant == "bat":
                return _Bat(targets, Names((part,)), rank)
            if variant == "mini":
                return _Fold(
                    targets, Names((part,)), rank, as_integer("mini_r", tile, 1, _MAX_TILE)
                )
            return _Fold(targets, Names((part,)), rank, None)


def _variant(fields: Fields, variants: tuple[str, ...]) -> str | None:
    value = fields.take("init_weights")
    if isinstance(value, bool | None):
        return None
    if not isinstance(value, str) or value not in variants:
        refuse_field("init_weights", value, f"true, false or one of {', '.join(variants)}")
    return value


@dataclass(frozen=True, eq=False)
class _Fold(LowRankTuner):
    rank: int
    # Columns of the block, which is repeated; None for as many as the module has outputs.
    tile: int | None

    def change(self, site: SiteSpec, given: Given) -> Factors:
        (part,) = self.names.parts
        tile = self.tile or site.out_features
        block = given.modules.take_shaped(site, part, (self.rank, tile))
        turns = -(-site.in_features // self.rank)
        a = torch.eye(self.rank).repeat(1, turns)[:, : site.in_features]
        return a, block.repeat(1, site.out_features // tile).T


@dataclass(frozen=True, eq=False)
class _Bat(LowRankTuner):
    """W M + M, where M has one block for each r outputs, and W is cut to blocks of r x r."""

    rank: int

    def change(self, site: SiteSpec, given: Given) -> Change:
        rank = self.rank
        if site.in_features % rank or site.out_features % rank:
            raise other_base(site, f"blocks of {(rank, rank)}")
        (part,) = self.names.parts
        block = given.modules.take_shaped(site, part, (site.out_features // rank, rank, rank))
        weight = given.structure.host_weight(site.name)
        blocks = weight.reshape(-1, rank, site.in_features // rank, rank).transpose(1, 2)
        delta = blocks @ block[:, None] + block[:, None]
        return delta.transpose(1, 2).reshape(site.out_features, site.in_features)
