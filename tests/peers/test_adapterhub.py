"""AdapterHub's answers from whole models: loaded, scheduled, packed, over pages of the cache.

Those that it gave once are kept. ADAPTERHUB_PYTHON names a Python that has it, to ask it anew.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import load_base
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.batch import StepBatch
from deltamux.engine.step.encoder_runner import EncoderRunner
from deltamux.extract.samples import sample_texts
from deltamux.verify.alone import Question, Refused
from deltamux.verify.interpreter import Interpreter
from deltamux.verify.mixed import mixed_answers
from deltamux.verify.run import verify
from deltamux.wire.messages import Sampling

GOLDENS = Path(__file__).parent / "adapterhub"
ADAPTERHUB = Interpreter(os.environ.get("ADAPTERHUB_PYTHON", ""), timeout=120)
needs_adapterhub = pytest.mark.skipif(
    not ADAPTERHUB.python, reason="ADAPTERHUB_PYTHON names no Python that has AdapterHub"
)


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
    adapted, plain = mixed_answers(base, parsed, [expected["ids"][0].tolist()])
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


@needs_adapterhub
@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("llama", "houlsby"),
        ("llama", "pfeiffer"),
        ("llama", "parallel"),
        ("llama", "compacter"),
        ("llama", "lora"),
        ("llama", "ia3"),
        ("gpt2", "houlsby"),
    ],
)
def test_an_adapter_is_verified_by_adapterhub_itself(name: str, adapter: str) -> None:
    folder, base = GOLDENS / name / adapter, str(GOLDENS / name)
    found = verify(folder, base, sample_texts(None), "cpu", "float32", ADAPTERHUB)
    assert found.library.startswith("AdapterHub 1.")
    assert found.effect is not None and found.effect > 0.1 and found.within(1e-4)


@needs_adapterhub
@pytest.mark.parametrize("adapter", ["houlsby", "compacter", "lora"])
def test_an_adapter_of_an_encoder_is_verified_by_adapterhub_itself(
    adapter: str, tmp_path: Path
) -> None:
    base = str(encoding_bert(tmp_path))
    folder = GOLDENS / "bert" / adapter
    found = verify(folder, base, sample_texts(None), "cpu", "float32", ADAPTERHUB)
    assert found.compared == ("embeddings", "embeddings")
    assert found.effect is not None and found.effect > 0.01 and found.within(1e-4)


@needs_adapterhub
def test_adapterhub_passes_over_nothing(tmp_path: Path) -> None:
    """What it merely logs is refused, and it is never let near a pickle."""
    shutil.copytree(GOLDENS / "llama" / "houlsby", tmp_path, dirs_exist_ok=True)
    question = Question(
        library="adapterhub",
        adapter=str(tmp_path),
        model=str(GOLDENS / "llama"),
        auto_class="AutoModelForCausalLM",
        config={},
        device="cpu",
        dtype="float32",
        prompts=[[3, 4]],
        plain="logits",
        adapted="logits",
    )
    weights = tmp_path / "adapter.safetensors"
    whole = load_file(weights)
    first = next(iter(whole))
    save_file({name: tensor for name, tensor in whole.items() if name != first}, weights)
    with pytest.raises(Refused, match=r"^AdapterHub reports missing_keys in the adapter: "):
        ADAPTERHUB.ask(question)
    save_file({**whole, "nothing.of.this.name": whole[first].clone()}, weights)
    with pytest.raises(Refused, match=r"unexpected_keys in the adapter: nothing\.of\.this\.name"):
        ADAPTERHUB.ask(question)
    weights.unlink()
    with pytest.raises(Refused, match=r"no adapter\.safetensors, which AdapterHub reads"):
        ADAPTERHUB.ask(question)


def encoding_bert(folder: Path) -> Path:
    """The bert that is kept as a decoder, with its config of an encoder."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "bert" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": False}))
    return folder
