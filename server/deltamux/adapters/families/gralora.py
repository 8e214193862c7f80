"""GraLoRA in PEFT's format: a low-rank delta for each of k x k blocks of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltamux.adapters.checkpoint.fields import as_integer, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import MAX_RANK, as_rank, as_scale, require_served_rank
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_A, _B = "gralora_A", "gralora_B"
_HYBRID_A, _HYBRID_B = "gralora_A_general.weight", "gralora_B_general.weight"

_HARMLESS = ("fan_in_fan_out", "gralora_dropout", "init_weights")


class GraLora(ModuleFamily):
    """Each block has rank r / k, the whole k r; a plain LoRA of rank hybrid_r may stand beside."""

    name = "gralora"
    peft_types = ("GRALORA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            targets = read_targets(fields, "gralora_only")
            rank = as_rank("r", fields.take("r"))
            hybrid_rank = as_integer("hybrid_r", fields.take("hybrid_r") or 0, 0, MAX_RANK)
            blocks = as_integer("gralora_k", fields.take("gralora_k"), 1, MAX_RANK)
            alpha = as_scale("alpha", fields.take("alpha"))
        if rank % blocks:
            refuse_field("gralora_k", blocks, f"a divisor of r = {rank}")
        require_served_rank("gralora_k times r", blocks * rank)
        names = Names((_A, _B, _HYBRID_A, _HYBRID_B))
        return _GraLora(targets, names, rank, hybrid_rank, blocks, alpha / (rank + hybrid_rank))


@dataclass(frozen=True, eq=False)
class _GraLora(LowRankTuner):
    rank: int
    hybrid_rank: int
    blocks: int
    scale: float

    def change(self, site: SiteSpec, given: Given) -> Factors:
        a, b = self._blocks(site, given)
        if rank := self.hybrid_rank:
            hybrid_a = given.modules.take_shaped(site, _HYBRID_A, (rank, site.in_features))
            hybrid_b = given.modules.take_shaped(site, _HYBRID_B, (site.out_features, rank))
            a, b = torch.cat((a, hybrid_a)), torch.cat((b, hybrid_b), dim=1)
        return a, b * self.scale

    def _blocks(self, site: SiteSpec, given: Given) -> Factors:
        """Slice j of block n of A meets slice n of block j of B."""
        k, r = self.blocks, self.rank
        fan_in, fan_out = site.in_features // k, site.out_features // k
        a = given.modules.take_shaped(site, _A, (k, fan_in, r))
        b = given.modules.take_shaped(site, _B, (k, r, fan_out))
        spread_a = torch.block_diag(*a.transpose(1, 2))  # type: ignore[no-untyped-call]
        spread_b = torch.zeros(k, fan_out, k, k, r // k)
        for block in range(k):
            spread_b[block, :, :, block] = b[block].reshape(k, r // k, fan_out).permute(2, 0, 1)
        return spread_a, spread_b.reshape(-1, k * r)
