"""The engine's own step with an adapter at embedding, head and layers, against PEFT alone."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltamux.demo.tasks import weights_path
from deltamux.verify.run import verify

BASE = str(weights_path() / "base")


LORA = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "down_proj"])
ALORA = peft.LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], alora_invocation_tokens=[40, 41]
)
PROMPT = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
PREFIX = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)


@pytest.fixture
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    config = copy.deepcopy(getattr(request, "param", LORA))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("adapter", [LORA, ALORA, PROMPT, PREFIX], indirect=True)
def test_every_row_has_its_adapter_also_behind_virtual_tokens(adapter: Path) -> None:
    texts = ("good morning\n", "a hat, a bear and a kite " * 9)
    found = verify(adapter, BASE, texts, "cpu", "float32")
    assert found.prompts == 2
    assert found.effect > 1
    assert found.largest < 1e-4 and found.base_largest < 1e-4
    assert found.within(1e-4) and not found.within(1e-9)
