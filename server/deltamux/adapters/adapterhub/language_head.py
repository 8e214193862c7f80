"""The language head that AdapterHub saves beside an adapter of any method."""

from __future__ import annotations

import torch

from deltamux.adapters.adapterhub.keyed_tensors import LANGUAGE_HEAD, KeyedTensors
from deltamux.adapters.payloads.base_fit import is_copy
from deltamux.adapters.payloads.replacement import replacement
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import Structure
from deltamux.errors import FailedPrecondition


def take_language_head(
    tensors: KeyedTensors, structure: Structure, dtype: torch.dtype
) -> tuple[dict[str, tuple[Payload, ...]], tuple[str, ...]]:
    """Its payload, or a note where it is the base's own: AdapterHub saves it trained or not.

    Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a trained one that changes embeddings too.
    """
    weight = tensors.take_any(LANGUAGE_HEAD)
    if weight is None:
        return {}, ()
    if f"{structure.head}.weight" != LANGUAGE_HEAD:
        raise FailedPrecondition(f"the base model has no {LANGUAGE_HEAD}", reason="BASE_MISMATCH")
    if is_copy(weight, structure.weight(structure.head)):
        return {}, (f"copy of the base left out: {LANGUAGE_HEAD}",)
    if structure.tied:
        raise FailedPrecondition(
            f"{LANGUAGE_HEAD} differs from the base model's, which is tied to its embeddings",
            reason="UNSUPPORTED_FEATURE",
        )
    site = structure.sites[structure.head]
    return {site.name: (replacement(site, weight, None, structure, dtype),)}, ()
