"""AdapterHub's answers from whole models: loaded, packed, in chunks, over pages of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.rows import Rows
from deltamux.adapters.sites import DeviceSites
from deltamux.base.load import load_base
from deltamux.engine.rehearsal import packed_logits

GOLDENS = Path(__file__).parent / "adapterhub"


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("llama", ["houlsby", "pfeiffer", "parallel", "compacter", "adapter_plus"]),
        ("mistral", ["houlsby", "pfeiffer", "parallel"]),
        ("gpt2", ["houlsby", "pfeiffer", "parallel"]),
    ],
)
def test_mixed_steps_answer_as_adapterhub_does(name: str, adapters: list[str]) -> None:
    base = load_base(str(GOLDENS / name))
    rows = Rows(base.device)
    sites = DeviceSites(
        base.model, base.structure, rows, len(adapters), 1 << 20, base.dtype, base.device
    )
    for slot, adapter in enumerate(adapters):
        parsed = parse_adapter(GOLDENS / name / adapter, adapter, base.structure, base.dtype)
        assert sites.reserve(slot, parsed)
        sites.write(slot, parsed)
    expected = load_file(GOLDENS / name / "logits.safetensors")
    prompt = expected["ids"][0].tolist()
    slots = [*range(len(adapters)), None]
    logits = packed_logits(base, [prompt] * len(slots), 16, rows, slots)
    for adapter, rows_of_one in zip([*adapters, "base"], logits, strict=True):
        torch.testing.assert_close(
            rows_of_one, expected[adapter][0], atol=1e-4, rtol=0, msg=adapter
        )
