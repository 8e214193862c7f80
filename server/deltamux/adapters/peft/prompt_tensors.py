"""The tensors of prompts, which belong to no module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition, InvalidArgument

PROMPT = "prompt_embeddings"


def require_tensors(tensors: Mapping[str, Tensor], *names: str) -> tuple[Tensor, ...]:
    """The weights of these names. Raises InvalidArgument for others, or for what is missing."""
    for name, tensor in tensors.items():
        if name not in names:
            message = f"{WEIGHTS}: {quoted(name)} is no part of an adapter of this type"
            raise InvalidArgument(message, reason="EXTRA_TENSORS")
        if not tensor.is_floating_point():
            message = f"{WEIGHTS}: {quoted(name)} has dtype {tensor.dtype}"
            raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InvalidArgument(f"{WEIGHTS} lacks {missing[0]}", reason="MISSING_TENSORS")
    return tuple(tensors[name] for name in names)


def prefix_site(structure: Structure) -> tuple[SiteSpec, int]:
    """Where keys and values before a prompt are kept, and how many numbers a layer's keys have.

    Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a base whose layers keep unlike ones.
    """
    shapes = {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in structure.layers}
    kv_heads, key_dim, value_dim = min(shapes)
    site = structure.sites.get(structure.embedding)
    if site is None or len(shapes) > 1 or key_dim != value_dim:
        raise unsupported("a prefix for a base whose layers keep keys or values unlike others'")
    return site, kv_heads * key_dim


def require_shape(name: str, tensor: Tensor, tokens: int, width: int) -> None:
    """Raises InvalidArgument for other than `tokens` rows, FailedPrecondition for another width."""
    if tensor.ndim != 2 or tensor.shape[0] != tokens:
        message = f"{name} is {tuple(tensor.shape)} where the config has {tokens} virtual tokens"
        raise InvalidArgument(message, reason="SHAPE_MISMATCH")
    if tensor.shape[1] != width:
        raise FailedPrecondition(
            f"{name} has rows of {tensor.shape[1]} numbers; this base model takes {width}",
            reason="BASE_MISMATCH",
        )
