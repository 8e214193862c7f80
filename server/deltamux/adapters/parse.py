"""From the two files on disk to an adapter that is checked against the base."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.manifest import Manifest, read_manifest
from deltamux.adapters.checkpoint.tensors import read_tensors
from deltamux.adapters.families import FAMILIES
from deltamux.adapters.family import Family
from deltamux.adapters.payloads.exact_halves import in_exact_halves
from deltamux.adapters.peft.head_config import read_head_config
from deltamux.adapters.peft.saved_head import take_task_head
from deltamux.adapters.peft.saved_modules import take_saved_modules
from deltamux.adapters.peft.second_copies import without_second_copies
from deltamux.adapters.peft.vocabulary import take_vocabulary
from deltamux.adapters.unserved import refusal
from deltamux.base.structure import Structure


def parse_adapter(folder: Path, digest: str, structure: Structure, dtype: torch.dtype) -> Adapter:
    """Reads the adapter in `folder`; its payloads lie on the host in `dtype`, low-rank ones that
    were saved in bfloat16 in that where it still holds their numbers.

    Raises InvalidArgument for a broken checkpoint and FailedPrecondition for a sound one that
    this base or this server cannot serve exactly.
    """
    manifest = read_manifest(folder)
    family = family_of(manifest)
    head_config = partial(read_head_config, folder)
    tensors = without_second_copies(read_tensors(folder), structure)
    saved_in_half = any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    trained = take_task_head(manifest, tensors, structure, dtype, head_config)
    vocabulary = take_vocabulary(trained.manifest, trained.tensors, trained.structure)
    saved = take_saved_modules(trained.manifest, vocabulary.tensors, vocabulary.structure, dtype)
    parsed = family.parse(saved.manifest, saved.tensors, saved.structure, dtype)
    if parsed.invocation and (saved.payloads or trained.head or vocabulary.size):
        raise unsupported(
            "modules_to_save or added tokens beside an adapter that acts on part of a prompt"
        )
    payloads = vocabulary.complete(parsed.payloads, saved.payloads, dtype)
    return Adapter(
        digest,
        family.name,
        parsed.rank,
        parsed.parameters + saved.parameters + trained.parameters + vocabulary.parameters,
        "; ".join((*parsed.notes, *vocabulary.notes)),
        in_exact_halves(payloads) if saved_in_half else payloads,
        trained.task,
        trained.head,
        parsed.invocation,
        parsed.reach,
        vocabulary.size,
    )


def family_of(manifest: Manifest) -> Family:
    """The family that serves such adapters; raises FailedPrecondition where there is none."""
    for family in FAMILIES:
        if family.claims(manifest):
            return family
    raise refusal(manifest)
