"""A module's own weight and bias in place of the base's, as a payload."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.adapters.payloads.base_fit import other_base, refuse_added_tokens
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.primitives.dense import Dense, DenseEmbedding
from deltamux.base.structure import SiteSpec, Structure


def replacement(
    site: SiteSpec, weight: Tensor, bias: Tensor | None, structure: Structure, dtype: torch.dtype
) -> Dense | DenseEmbedding:
    """`weight` and `bias` [out] replace those of a linear module, a head or an embedding.

    `weight` is [out, in], of an embedding [in, out]. Raises FailedPrecondition (BASE_MISMATCH,
    ADDED_TOKENS) where they do not have the base's shapes.
    """
    refuse_added_tokens(site, len(weight))
    if weight.shape != structure.weight(site.name).shape:
        raise other_base(site, f"weight of {tuple(weight.shape)}")
    if site.kind == "embedding":
        return DenseEmbedding(to_serving(site, weight.float() * site.embed_scale, dtype))
    if bias is not None and bias.shape != (site.out_features,):
        raise other_base(site, f"bias of {tuple(bias.shape)}")
    return Dense(
        to_serving(site, weight, dtype), None if bias is None else to_serving(site, bias, dtype)
    )
