"""What PEFT's kinds of prompt tuning have in common: their fields, and tensors of no module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, as_integer, refuse_field, unsupported
from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.adapters.peft.shared_fields import PROVENANCE, refuse_executable
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition, InvalidArgument

PROMPT = "prompt_embeddings"

_MAX_TOKENS = 1 << 20


def read_prompt_fields(manifest: Manifest) -> tuple[Fields, int]:
    """The fields that are left, and the number of virtual tokens.

    Raises FailedPrecondition for the prompt of another task than CAUSAL_LM: without any, PEFT
    loads such an adapter and does not use it.
    """
    if manifest.task != "generation":
        raise unsupported("a prompt for another task than CAUSAL_LM")
    fields = Fields(manifest.fields)
    refuse_executable(fields)
    submodules = fields.take("num_transformer_submodules")
    if submodules not in (None, 1):
        refuse_field("num_transformer_submodules", submodules, "1")
    tokens = as_integer("num_virtual_tokens", fields.take("num_virtual_tokens"), 1, _MAX_TOKENS)
    return fields, tokens


def require_read(fields: Fields, harmless: tuple[str, ...]) -> None:
    """Raises FailedPrecondition for a field that is neither taken nor harmless.

    The sizes of the base that training saw are told by the tensors, too.
    """
    fields.discard((*PROVENANCE, "token_dim", "num_attention_heads", "num_layers", *harmless))
    fields.require_none_left()


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
