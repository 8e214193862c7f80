"""Prefix tuning and cartridges: trained keys and values before a prompt, in every layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, unsupported
from deltamux.adapters.peft.prompt_family import PromptFamily
from deltamux.adapters.peft.prompt_tensors import (
    PROMPT,
    prefix_site,
    require_shape,
    require_tensors,
)
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.virtual_tokens import KeyValuePrefix
from deltamux.base.structure import SiteSpec, Structure


class PrefixTuning(PromptFamily):
    """PEFT saves keys and values as attention reads them: there is no rotation left to do.

    Row j of the file is virtual token j: key and value of each layer, one behind the other.
    """

    def read(
        self, fields: Fields, tokens: int, tensors: Mapping[str, Tensor], structure: Structure
    ) -> tuple[SiteSpec, Payload]:
        heads = fields.take("num_attention_heads")
        (prompt,) = require_tensors(tensors, PROMPT)
        layers = structure.layers
        site, width = prefix_site(structure)
        kv_heads = layers[0].kv_heads
        if heads not in (None, kv_heads):
            raise unsupported(f"num_attention_heads = {heads}, where the base keeps {kv_heads},")
        require_shape(PROMPT, prompt, tokens, len(layers) * 2 * width)
        states = prompt.view(tokens, len(layers), 2, width).permute(1, 2, 0, 3)
        return site, KeyValuePrefix(states)


PREFIX_TUNING = PrefixTuning(
    "prefix_tuning", "PREFIX_TUNING", ("encoder_hidden_size", "init_weights", "prefix_projection")
)

CARTRIDGE = PrefixTuning("cartridge", "CARTRIDGE", ("encoder_hidden_size", "num_frozen_tokens"))
