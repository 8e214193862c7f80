"""Trainable tokens in PEFT's format: the embeddings of a few tokens, and their rows of the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.patterns import Selector
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_selector, targeted_sites
from deltamux.adapters.peft.trained_tokens import (
    INDICES_FIELD,
    TOKEN_ROWS,
    read_tokens,
    tied_token_rows,
)
from deltamux.adapters.peft.weight_tying import require_tied
from deltamux.base.structure import Kind, Structure

_KINDS: frozenset[Kind] = frozenset(("embedding", "head"))


class TrainableTokens:
    """The rows are saved whole. A head that is tied to the embedding is trained with it."""

    name = "trainable_tokens"

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == "TRAINABLE_TOKENS"

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        config = _read_config(manifest.fields, structure)
        modules = ModuleTensors(tensors, structure, Names((TOKEN_ROWS,)))
        notes = modules.drop_base_copies()
        sites = {site.name for site in targeted_sites(config.selector, structure, _KINDS)}
        if structure.tied and structure.embedding in sites:
            sites.discard(structure.head)
        rows = {site: modules.take(site, TOKEN_ROWS, 2) for site in sites}
        parameters = modules.taken
        if structure.tied and structure.embedding in sites:
            require_tied(modules.take(structure.head, TOKEN_ROWS, 2), rows[structure.embedding])
        modules.require_none_left()
        found = tied_token_rows(dict.fromkeys(sites, config.tokens), rows, structure, dtype)
        payloads = {site: (payload,) for site, payload in found.items()}
        return Parsed(payloads, rank=0, parameters=parameters, notes=notes)


@dataclass(frozen=True, eq=False)
class _Config:
    selector: Selector
    tokens: tuple[int, ...]


def _read_config(values: Mapping[str, Json], structure: Structure) -> _Config:
    targets = values.get("target_modules") or [structure.embedding]
    # How the rows were first drawn does not matter: they are in the file.
    with tuner_fields({**values, "target_modules": targets}, ("init_weights",)) as fields:
        tokens = read_tokens(INDICES_FIELD, fields.take(INDICES_FIELD))
        return _Config(read_selector(fields), tokens)
