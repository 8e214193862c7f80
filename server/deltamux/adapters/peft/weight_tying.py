"""PEFT's ensure_weight_tying: a head that is tied to the embedding is trained with it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deltamux.adapters.peft.patterns import Pattern, Selector
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import InvalidArgument

FIELD = "ensure_weight_tying"

# PEFT's words for the two modules that may be tied.
_PAIR = ("embed_tokens", "lm_head")


def tied_pair(names: Iterable[str], structure: Structure) -> dict[str, SiteSpec]:
    """Embedding and head, if they share a weight and one of `names` means either as PEFT has it."""
    meant = any(name.rpartition(".")[2] in _PAIR for name in names)
    if not (meant and structure.tied):
        return {}
    return {name: structure.sites[name] for name in (structure.embedding, structure.head)}


def targeted_pair(selector: Selector, structure: Structure) -> dict[str, SiteSpec]:
    """The same for modules that are targeted; none if they were replaced."""
    if structure.embedding not in structure.sites:
        return {}
    if isinstance(selector.targets, Pattern):
        return tied_pair(filter(selector.targets.matches, _PAIR), structure)
    return tied_pair(selector.targets or (), structure)


def require_tied(head: Tensor, embedding: Tensor) -> None:
    """PEFT saves both although they are one. Raises InvalidArgument where they differ."""
    if not torch.equal(head, embedding):
        raise InvalidArgument(
            "the trained head and embedding share one weight, but their tensors differ",
            reason="TIED_TENSORS_DIFFER",
        )
