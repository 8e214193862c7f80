"""What PEFT's kinds of prompt tuning have in common: what stands before a prompt, at one site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, as_integer, refuse_field, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.rounding import rounded
from deltamux.adapters.peft.shared_fields import PROVENANCE, refuse_executable
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec, Structure

_MAX_TOKENS = 1 << 20

# The sizes of the base that training saw, which are told by the tensors, too.
_SIZES = ("token_dim", "num_attention_heads", "num_layers")


@dataclass(eq=False)
class PromptFamily(ABC):
    """`harmless` names the fields of training alone."""

    name: str
    peft_type: str
    harmless: tuple[str, ...]

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == self.peft_type

    @abstractmethod
    def read(
        self, fields: Fields, tokens: int, tensors: Mapping[str, Tensor], structure: Structure
    ) -> tuple[SiteSpec, Payload]:
        """The site, and the payload of so many virtual tokens before it is rounded.

        Takes the fields of its own. Raises as `parse` does.
        """

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        fields, tokens = _read_fields(manifest)
        site, payload = self.read(fields, tokens, tensors, structure)
        fields.discard((*PROVENANCE, *_SIZES, *self.harmless))
        fields.require_none_left()
        payloads = {site.name: (rounded(site, payload, dtype),)}
        numbers = sum(tensor.numel() for tensor in tensors.values())
        return Parsed(payloads, 0, numbers, (f"{tokens} virtual tokens",))


def _read_fields(manifest: Manifest) -> tuple[Fields, int]:
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
