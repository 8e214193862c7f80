"""AdapterHub's answers from whole models: loaded, scheduled, packed, over pages of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltamux.adapters.parse import parse_adapter
from deltamux.base.load import load_base
from deltamux.verify.path import mixed_logits

GOLDENS = Path(__file__).parent / "adapterhub"


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("llama", "houlsby"),
        ("llama", "compacter"),
        ("llama", "adapter_plus"),
        ("llama", "lora"),
        ("mistral", "pfeiffer"),
        ("gpt2", "parallel"),
    ],
)
def test_an_adapter_and_the_base_answer_as_in_adapterhub(name: str, adapter: str) -> None:
    base = load_base(str(GOLDENS / name))
    parsed = parse_adapter(GOLDENS / name / adapter, adapter, base.structure, base.dtype)
    expected = load_file(GOLDENS / name / "logits.safetensors")
    adapted, plain = mixed_logits(base, parsed, [expected["ids"][0].tolist()])
    torch.testing.assert_close(adapted, expected[adapter][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(plain, expected["base"][0], atol=1e-4, rtol=0)
