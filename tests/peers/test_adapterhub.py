"""AdapterHub's answers from whole models: loaded, scheduled, packed, over pages of the cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.rows import Rows
from deltamux.adapters.sites import DeviceSites
from deltamux.base.load import load_base
from deltamux.engine.batch import StepBatch
from deltamux.engine.encoder_runner import EncoderRunner
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sequence import Scheduled
from deltamux.verify.path import mixed_logits
from deltamux.wire.messages import Sampling

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


def test_the_hidden_states_of_an_encoder_are_those_of_adapterhub(tmp_path: Path) -> None:
    """All adapters in one step, with a row without adapter last."""
    names = ["houlsby", "pfeiffer", "parallel", "compacter", "lora", "ia3"]
    base = load_base(str(encoding_bert(tmp_path)))
    rows = Rows(base.device)
    sites = DeviceSites(
        base.model, base.structure, rows, len(names), 1 << 20, base.dtype, base.device
    )
    for slot, name in enumerate(names):
        parsed = parse_adapter(GOLDENS / "bert" / name, name, base.structure, base.dtype)
        assert sites.reserve(slot, parsed)
        sites.write(slot, parsed)
    ids = load_file(GOLDENS / "bert" / "logits.safetensors")["ids"][0].tolist()
    sequences = [trial_sequence(i, ids, [i], Sampling()) for i in range(len(names) + 1)]
    for slot in range(len(names)):
        sequences[slot].slot = slot
    step = [Scheduled(sequence, sequence.num_places) for sequence in sequences]
    hidden = EncoderRunner(base, rows, 16).forward(StepBatch.build(step, 16, base.device))
    expected = load_file(GOLDENS / "bert" / "hidden.safetensors")
    for name, states in zip([*names, "base"], hidden.split(len(ids)), strict=True):
        torch.testing.assert_close(states, expected[name][0], atol=1e-4, rtol=0, msg=name)


def encoding_bert(folder: Path) -> Path:
    """The bert that is kept as a decoder, with its config of an encoder."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "bert" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": False}))
    return folder
