"""LoRA in PEFT's format: y += s (x A^T) B, with rsLoRA, DoRA, BD-LoRA, lora_bias, trained biases
and inits that shift the base, at any linear module, the language head and embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.peft.base_shift import part_taken_out
from deltamux.adapters.peft.expert_tensors import (
    ExpertTarget,
    expert_targets,
    refuse_former_names,
    take_experts,
)
from deltamux.adapters.peft.lora_config import LoraConfig, read_lora_config
from deltamux.adapters.peft.module_tensors import PREFIX, ModuleTensors, Names
from deltamux.adapters.peft.per_module import require_served_rank
from deltamux.adapters.peft.targets import LINEAR_OR_EMBEDDING, targeted_sites
from deltamux.adapters.peft.trained_biases import take_bias_shifts
from deltamux.adapters.peft.trained_tokens import TOKEN_ROWS, take_trained_tokens
from deltamux.adapters.peft.weight_tying import require_tied, targeted_pair
from deltamux.adapters.primitives.embedding_low_rank import EmbeddingLowRank
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.adapters.primitives.row_scale import RowScale
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import InvalidArgument

_NAMES = Names(
    (
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_diag"),
        *("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    ),
    aliases={
        "lora_magnitude_vector.weight": "lora_magnitude_vector",
        f"token_adapter.{TOKEN_ROWS}": TOKEN_ROWS,
    },
)

# Rows of a weight that are widened to float32 at a time.
_NORM_ROWS = 1024


class Lora:
    """The family of LoRA and its variants that keep the base weights."""

    name = "lora"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "LORA"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        config = read_lora_config(manifest.fields)
        pair = targeted_pair(config.selector, structure) if config.tied else {}
        sites, experts = _targets(config, structure, pair)
        names = replace(_NAMES, shared=tuple(chain(*(target.tensors for target in experts))))
        modules = ModuleTensors(tensors, structure, names)
        of_experts = take_experts(experts, modules, config.ranks.of, config.scale_of, dtype)
        shifts = take_bias_shifts(config.trained_biases, sites, modules, structure)
        tokens = take_trained_tokens(config.trained_tokens, modules, structure, dtype)
        notes = modules.drop_base_copies()
        reader = _SiteReader(config, modules, structure, dtype)
        payloads: dict[str, tuple[Payload, ...]] = {
            site.name: tuple(reader.payloads(site, shifts.pop(site.name, None))) for site in sites
        }
        for name, shift in shifts.items():
            payloads[name] = (RowBias(to_serving(structure.sites[name], shift, dtype)),)
        for name in tokens.keys() & payloads.keys():
            raise unsupported(f"trained tokens at {name}, which is adapted besides,")
        payloads.update({name: (rows,) for name, rows in tokens.items()})
        payloads.update({name: (payload,) for name, payload in of_experts.items()})
        modules.require_none_left()
        if pair:
            _require_tied(tensors, structure)
        ranks = [_rank(payloads), *(config.ranks.of(target.name) for target in experts)]
        return Parsed(payloads, max(ranks), modules.taken, notes, config.invocation)


def _targets(
    config: LoraConfig, structure: Structure, pair: Mapping[str, SiteSpec]
) -> tuple[list[SiteSpec], list[ExpertTarget]]:
    targets = targeted_sites(config.selector, structure, LINEAR_OR_EMBEDDING)
    refuse_former_names(targets, structure)
    experts = expert_targets(config.parameters, structure)
    sites = {**{site.name: site for site in targets}, **pair}
    if config.invocation and any(site.kind == "embedding" for site in sites.values()):
        raise unsupported("alora_invocation_tokens at an embedding")
    for table in (config.ranks, config.alphas):
        table.require_used([*sites, *(target.name for target in experts)])
    return list(sites.values()), experts


def _require_tied(tensors: Mapping[str, Tensor], structure: Structure) -> None:
    """Of a tied pair, A of the head is B of the embedding, and the other way round."""
    for head, embedding in (("A", "B"), ("B", "A")):
        require_tied(
            tensors[f"{PREFIX}{structure.head}.lora_{head}.weight"],
            tensors[f"{PREFIX}{structure.embedding}.lora_embedding_{embedding}"].T,
        )


def _rank(payloads: Mapping[str, tuple[Payload, ...]]) -> int:
    every = (payload for site in payloads.values() for payload in site)
    return max((len(p.a) for p in every if isinstance(p, LowRank | EmbeddingLowRank)), default=0)


class _SiteReader:
    """Turns the tensors of one module into payloads in the serving dtype."""

    def __init__(
        self, config: LoraConfig, modules: ModuleTensors, structure: Structure, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._modules = modules
        self._structure = structure
        self._dtype = dtype

    def payloads(self, site: SiteSpec, bias_shift: Tensor | None) -> Iterator[Payload]:
        a, b = self._factors(site)
        if site.kind == "embedding":
            scaled = b * site.embed_scale
            yield EmbeddingLowRank(self._serving(site, a), self._serving(site, scaled.T))
        else:
            yield LowRank(self._serving(site, a), self._serving(site, b.T))
        if self._config.dora:
            yield self._magnitude(site, a, b)
        biases = [] if bias_shift is None else [bias_shift]
        if self._config.bias:
            biases.append(self._bias(site))
        if biases:
            yield RowBias(self._serving(site, torch.stack(biases).sum(0)))

    def _factors(self, site: SiteSpec) -> Factors:
        config, rank = self._config, self._config.ranks.of(site.name)
        a, b = (self._modules.take(site.name, part, 2).float() for part in _matrices(site))
        if config.blocks is not None:
            a, b = config.blocks.expand(site, a, b)
        _check_shapes(site, a, b, rank)
        b = b * config.scale_of(site.name)
        if config.shift == "kasa":
            a = a * self._modules.take_shaped(site, "lora_diag", (rank,))[:, None]
        if config.shifts(site):
            scale = config.scale_of(site.name)
            taken_a, taken_b = part_taken_out(config.shift, site, self._structure, rank, scale)
            a, b = torch.cat((a, taken_a)), torch.cat((b, -taken_b), dim=1)
            require_served_rank(f"twice the rank of {site.name}", len(a))
        return a, b

    def _bias(self, site: SiteSpec) -> Tensor:
        if site.kind == "embedding":
            raise InvalidArgument(f"lora_bias does not apply to the embedding {site.name}")
        return self._vector(site, "lora_B.bias") * self._config.scale_of(site.name)

    def _magnitude(self, site: SiteSpec, a: Tensor, b: Tensor) -> RowScale:
        weight = self._structure.weight(site.name)
        rows = weight.T if site.kind == "embedding" else weight
        magnitude = self._vector(site, "lora_magnitude_vector")
        return RowScale(self._serving(site, magnitude / _row_norms(rows, a, b)))

    def _vector(self, site: SiteSpec, part: str) -> Tensor:
        vector = self._modules.take(site.name, part, 1).float()
        if vector.shape[0] != site.out_features:
            raise other_base(site, f"{part} of {tuple(vector.shape)}")
        return vector

    def _serving(self, site: SiteSpec, tensor: Tensor) -> Tensor:
        return to_serving(site, tensor, self._dtype)


def _matrices(site: SiteSpec) -> tuple[str, str]:
    if site.kind == "embedding":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _check_shapes(site: SiteSpec, a: Tensor, b: Tensor, rank: int) -> None:
    if a.shape[0] != b.shape[1]:
        message = f"{site.name}: {_shapes(a, b)} do not chain"
        raise InvalidArgument(message, reason="SHAPE_MISMATCH")
    if (a.shape[1], b.shape[0]) != (site.in_features, site.out_features):
        raise other_base(site, _shapes(a, b))
    if a.shape[0] != rank:
        raise InvalidArgument(
            f"{site.name}: {_shapes(a, b)} have rank {a.shape[0]}, the config says {rank}",
            reason="RANK_MISMATCH",
        )


def _shapes(a: Tensor, b: Tensor) -> str:
    return f"lora_A of {tuple(a.shape)} and lora_B of {tuple(b.shape)}"


def _row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Euclidean norm of each row of weight + b a, float32 [out], on the host."""
    a, b = a.to(weight.device), b.to(weight.device)
    norms = []
    for start in range(0, weight.shape[0], _NORM_ROWS):
        rows = slice(start, start + _NORM_ROWS)
        norms.append(torch.linalg.vector_norm(weight[rows].float() + b[rows] @ a, dim=1))
    return torch.cat(norms).cpu()
