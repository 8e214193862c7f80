"""Tokens whose embeddings were trained alone: PEFT saves their rows whole, not as a delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer, refuse_field, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.adapters.payloads.base_fit import other_base, refuse_added_tokens
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.primitives.token_rows import TokenRows
from deltamux.base.structure import Structure

# The trained tokens of each module in a config of LoRA, those of a config of trainable tokens, and
# their rows in any checkpoint.
TOKENS_FIELD = "trainable_token_indices"
INDICES_FIELD = "token_indices"
TOKEN_ROWS = "trainable_tokens_delta"

MAX_TOKEN = (1 << 31) - 1


@dataclass(frozen=True)
class TrainedTokens:
    """Token ids by the end of a module's name, "" for the token embedding; `tied` says that a head
    which shares the embedding's weight must have the same."""

    by_module: Mapping[str, tuple[int, ...]]
    tied: bool


def read_tokens(name: str, value: Json) -> tuple[int, ...]:
    """Reads a list of token ids, all different."""
    if not isinstance(value, list) or not value:
        refuse_field(name, value, "a list of token ids")
    ids = tuple(as_integer(name, token, 0, MAX_TOKEN) for token in value)
    if len(set(ids)) < len(ids):
        refuse_field(name, value, "a list of different token ids")
    return ids


def read_trained_tokens(value: Json, tied: bool) -> TrainedTokens:
    """Reads a list of token ids, or one for each module."""
    if value is None:
        return TrainedTokens({}, tied)
    lists = value if isinstance(value, dict) else {"": value}
    ids = {module: read_tokens(TOKENS_FIELD, tokens) for module, tokens in lists.items()}
    return TrainedTokens(ids, tied)


def trained_ids(manifest: Manifest) -> set[int]:
    """All token ids whose rows a checkpoint of any family has trained alone."""
    if manifest.peft_type == "TRAINABLE_TOKENS":
        return set(read_tokens(INDICES_FIELD, manifest.fields.get(INDICES_FIELD)))
    chosen = read_trained_tokens(manifest.fields.get(TOKENS_FIELD), tied=False)
    return {token for tokens in chosen.by_module.values() for token in tokens}


def take_trained_tokens(
    tokens: TrainedTokens, modules: ModuleTensors, structure: Structure, dtype: torch.dtype
) -> dict[str, TokenRows]:
    """Takes the rows of the trained tokens of each module.

    As in PEFT, a head that shares the embedding's weight follows it, unless the config names other
    tokens for it.
    Raises FailedPrecondition for a module that is no embedding or head that can be served so.
    """
    ids = {_site(name, structure): chosen for name, chosen in tokens.by_module.items()}
    if structure.tied and structure.embedding in ids and structure.head in ids:
        if ids[structure.head] == ids[structure.embedding]:
            del ids[structure.head]
        elif tokens.tied:
            given: Json = [*tokens.by_module]
            refuse_field(TOKENS_FIELD, given, "the same tokens for modules that share a weight")
    rows = {site: modules.take(site, TOKEN_ROWS, 2) for site in ids}
    return tied_token_rows(ids, rows, structure, dtype)


def tied_token_rows(
    ids: Mapping[str, Sequence[int]],
    rows: Mapping[str, Tensor],
    structure: Structure,
    dtype: torch.dtype,
) -> dict[str, TokenRows]:
    """Payloads by site; a tied head without ids of its own has those of the embedding.

    `rows` [tokens, width] are in the order of `ids`.
    """
    source = {site: site for site in ids}
    if structure.tied and structure.embedding in ids:
        source.setdefault(structure.head, structure.embedding)
    return {
        site: token_payload(site, ids[of], rows[of], structure, dtype)
        for site, of in source.items()
    }


def _site(name: str, structure: Structure) -> str:
    """The one embedding or head that `name` ends; the token embedding for ""."""
    if not name:
        return structure.embedding
    found = [
        site.name
        for site in structure.sites.values()
        if site.kind in ("embedding", "head") and site.name.endswith(name)
    ]
    if len(found) != 1:
        raise unsupported(f"{TOKENS_FIELD} at {quoted(name)}, no embedding or head,")
    return found[0]


def token_payload(
    name: str, ids: Sequence[int], rows: Tensor, structure: Structure, dtype: torch.dtype
) -> TokenRows:
    """Of different `ids` and their rows [tokens, width] at one embedding or head.

    Raises FailedPrecondition where the site is none that can be served so, or has another width.
    """
    site = structure.sites.get(name)
    if site is None or structure.bias(name) is not None:
        raise unsupported(f"trained tokens at {name}, which has a bias or was replaced,")
    refuse_added_tokens(site, max(ids) + 1 - structure.added_tokens)
    if rows.shape != (len(ids), structure.weight(name).shape[1]):
        what = f"rows of {tuple(rows.shape)} for {len(ids)} tokens"
        raise other_base(site, what)
    return TokenRows.of(ids, to_serving(site, rows.float() * site.embed_scale, dtype))
