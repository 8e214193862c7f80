"""The language head that AdapterHub saves beside an adapter of any method."""

from __future__ import annotations

import torch

from deltamux.adapters.keyed_tensors import KeyedTensors
from deltamux.adapters.module_tensors import is_copy
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.replacement import replacement
from deltamux.base.structure import Structure
from deltamux.errors import FailedPrecondition


def take_language_head(
    tensors: KeyedTensors, structure: Structure, dtype: torch.dtype
) -> tuple[dict[str, tuple[Payload, ...]], tuple[str, ...]]:
    """Its payload, or a note where it is the base's own: AdapterHub saves it trained or not.

    Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a trained one that changes embeddings too.
    """
    weight = tensors.take_any("lm_head.weight")
    if weight is None:
        return {}, ()
    if is_copy(weight, structure.weight(structure.head)):
        return {}, ("copy of the base left out: lm_head.weight",)
    if structure.tied:
        raise FailedPrecondition(
            "lm_head.weight differs from the base model's, which is tied to its embeddings",
            reason="UNSUPPORTED_FEATURE",
        )
    site = structure.sites[structure.head]
    return {site.name: (replacement(site, weight, None, structure, dtype),)}, ()
