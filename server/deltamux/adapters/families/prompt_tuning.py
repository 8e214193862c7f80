"""Prompt tuning, p-tuning, CPT and multitask prompt tuning: trained embeddings before a prompt."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, as_integer, unsupported
from deltamux.adapters.peft.prompt_family import PromptFamily
from deltamux.adapters.peft.prompt_tensors import PROMPT, require_shape, require_tensors
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.virtual_tokens import VirtualTokens
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import InvalidArgument

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"

# How the prompt was first filled; it is in the file.
_INIT = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
)


class PromptTuning(PromptFamily):
    """PEFT saves the prompt that came out, whatever encoder or projection trained it."""

    def read(
        self, fields: Fields, tokens: int, tensors: Mapping[str, Tensor], structure: Structure
    ) -> tuple[SiteSpec, Payload]:
        (prompt,) = require_tensors(tensors, PROMPT)
        return _embedding_for(prompt, tokens, structure), VirtualTokens(prompt)


PROMPT_TUNING = PromptTuning("prompt_tuning", "PROMPT_TUNING", _INIT)

P_TUNING = PromptTuning(
    "p_tuning",
    "P_TUNING",
    (
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
    ),
)

CPT = PromptTuning(
    "cpt",
    "CPT",
    (
        "cpt_mask",
        "cpt_token_ids",
        "cpt_tokens_type_mask",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
        "opt_weighted_loss_type",
        "tokenizer_name_or_path",
    ),
)


class MultitaskPromptTuning(PromptFamily):
    """prompt * (columns @ rows) of the task, folded at load where there is but one task.

    With more of them PEFT wants a task id beside each prompt, which no request has.
    """

    def read(
        self, fields: Fields, tokens: int, tensors: Mapping[str, Tensor], structure: Structure
    ) -> tuple[SiteSpec, Payload]:
        rank = _read_rank(fields)
        prompt, columns, rows = require_tensors(tensors, PROMPT, _COLUMNS, _ROWS)
        site = _embedding_for(prompt, tokens, structure)
        if columns.shape != (1, tokens, rank) or rows.shape != (1, rank, prompt.shape[-1]):
            raise InvalidArgument(
                f"{_COLUMNS} of {tuple(columns.shape)} and {_ROWS} of {tuple(rows.shape)} are not "
                f"those of 1 task, {tokens} virtual tokens and rank {rank}",
                reason="SHAPE_MISMATCH",
            )
        folded = prompt.float() * (columns[0].float() @ rows[0].float())
        return site, VirtualTokens(folded)


MULTITASK_PROMPT_TUNING = MultitaskPromptTuning(
    "multitask_prompt_tuning",
    "MULTITASK_PROMPT_TUNING",
    (*_INIT, "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"),
)


def _read_rank(fields: Fields) -> int:
    tasks = fields.take("num_tasks")
    if tasks not in (None, 1):
        raise unsupported(f"num_tasks = {tasks}: a request cannot name its task, so more than one")
    return as_integer("num_ranks", fields.take("num_ranks"), 1, 1 << 16)


def _embedding_for(prompt: Tensor, tokens: int, structure: Structure) -> SiteSpec:
    """The embedding of the base; raises where it is out of reach or has rows of another width."""
    site = structure.sites.get(structure.embedding)
    if site is None:
        raise unsupported("a prompt for a base whose embedding is replaced or out of reach")
    require_shape(PROMPT, prompt, tokens, site.out_features)
    return site
