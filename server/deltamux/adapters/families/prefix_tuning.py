"""Prefix tuning and cartridges: trained keys and values before a prompt, in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.peft.prompt_tensors import (
    PROMPT,
    prefix_site,
    read_prompt_fields,
    require_read,
    require_shape,
    require_tensors,
)
from deltamux.adapters.primitives.virtual_tokens import KeyValuePrefix
from deltamux.base.structure import Structure


@dataclass(eq=False)
class PrefixTuning:
    """PEFT saves keys and values as attention reads them: there is no rotation left to do.

    Row j of the file is virtual token j: key and value of each layer, one behind the other.
    `harmless` names the fields of training alone.
    """

    name: str
    peft_type: str
    harmless: tuple[str, ...]

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type == self.peft_type

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        fields, tokens = read_prompt_fields(manifest)
        heads = fields.take("num_attention_heads")
        require_read(fields, self.harmless)
        (prompt,) = require_tensors(tensors, PROMPT)
        layers = structure.layers
        site, width = prefix_site(structure)
        kv_heads = layers[0].kv_heads
        if heads not in (None, kv_heads):
            raise unsupported(f"num_attention_heads = {heads}, where the base keeps {kv_heads},")
        require_shape(PROMPT, prompt, tokens, len(layers) * 2 * width)
        states = prompt.view(tokens, len(layers), 2, width).permute(1, 2, 0, 3)
        payloads = {site.name: (KeyValuePrefix(to_serving(site, states, dtype)),)}
        return Parsed(payloads, 0, prompt.numel(), (f"{tokens} virtual tokens",))


PREFIX_TUNING = PrefixTuning(
    "prefix_tuning", "PREFIX_TUNING", ("encoder_hidden_size", "init_weights", "prefix_projection")
)

CARTRIDGE = PrefixTuning("cartridge", "CARTRIDGE", ("encoder_hidden_size", "num_frozen_tokens"))
