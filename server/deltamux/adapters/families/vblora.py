"""VB-LoRA in PEFT's format: A and B pieced together from mixtures of one bank of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import as_rank
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec
from deltamux.errors import InvalidArgument

_BANK = "vblora_vector_bank"
_LOGITS = (_A, _B) = ("vblora_logits_A", "vblora_logits_B")
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"

_HARMLESS = ("fan_in_fan_out", "init_logits_std", "init_vector_bank_bound", "vblora_dropout")

_MAX_SIZE = 1 << 24


class VbLora(ModuleFamily):
    """Each piece is the softmax of its `topk` largest logits over as many vectors of the bank."""

    name = "vblora"
    peft_types = ("VBLORA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            vectors = as_integer("num_vectors", fields.take("num_vectors"), 1, _MAX_SIZE)
            mixtures = fields.take_bool("save_only_topk_weights")
            return _VbLora(
                read_targets(fields, "vblora_only"),
                _names(mixtures),
                as_rank("r", fields.take("r")),
                vectors,
                as_integer("vector_length", fields.take("vector_length"), 1, _MAX_SIZE),
                as_integer("topk", fields.take("topk"), 1, vectors),
                mixtures,
            )


def _names(mixtures: bool) -> Names:
    if not mixtures:
        return Names(_LOGITS, shared=(_BANK,))
    indices = tuple(part + _INDICES for part in _LOGITS)
    weights = tuple(part + _WEIGHTS for part in _LOGITS)
    return Names(indices + weights, integers=indices, shared=(_BANK,))


@dataclass(frozen=True, eq=False)
class _VbLora(LowRankTuner):
    rank: int
    vectors: int
    length: int
    topk: int
    mixtures: bool

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        return (modules.take_shared(_BANK, (self.vectors, self.length)),)

    def change(self, site: SiteSpec, given: Given) -> Factors:
        rank, length = self.rank, self.length
        a = self._pieces(site, given, _A, (rank, site.in_features // length))
        b = self._pieces(site, given, _B, (site.out_features // length, rank))
        return a.reshape(rank, -1), b.transpose(1, 2).reshape(-1, rank)

    def _pieces(self, site: SiteSpec, given: Given, part: str, shape: tuple[int, int]) -> Tensor:
        """[*shape, vector_length]"""
        (bank,) = given.shared
        if self.mixtures:
            weights, indices = self._saved_mixture(site, given.modules, part, shape)
        else:
            logits = given.modules.take_shaped(site, part, (*shape, self.vectors))
            largest, indices = logits.topk(self.topk)
            weights = largest.softmax(-1)
        return (weights[..., None] * bank[indices]).sum(-2)

    def _saved_mixture(
        self, site: SiteSpec, modules: ModuleTensors, part: str, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The file leaves out the last weight of each piece: all of them add up to 1."""
        first = modules.take_shaped(site, part + _WEIGHTS, (*shape, self.topk - 1))
        indices = modules.take(site.name, part + _INDICES, 3).long()
        weights = torch.cat((first, 1 - first.sum(-1, keepdim=True)), -1)
        ordered = indices.sort(-1).values
        if (
            indices.shape != weights.shape
            or indices.min() < 0
            or indices.max() >= self.vectors
            or weights.min() < 0
            or (ordered[..., 1:] == ordered[..., :-1]).any()
        ):
            message = f"{site.name}: {part} is no mixture of {self.topk} of {self.vectors} vectors"
            raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")
        return weights, indices
