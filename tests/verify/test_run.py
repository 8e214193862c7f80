"""The engine's own steps with one adapter beside the base, against its library alone."""

from __future__ import annotations

import copy
import warnings
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from deltamux.demo.tasks import weights_path
from deltamux.extract.samples import sample_texts
from deltamux.verify import run
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
    return trained(tmp_path, BASE, "AutoModelForCausalLM", getattr(request, "param", LORA))


def trained(folder: Path, base: str, auto_class: str, config: peft.PeftConfig) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_pretrained(base)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=400,
        initializer_range=0.2,
    )
    transformers.BertForPreTraining(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adapter", [LORA, ALORA, PROMPT, PREFIX], indirect=True)
def test_every_row_has_its_adapter_also_behind_virtual_tokens(adapter: Path) -> None:
    texts = ("good morning\n", "a hat, a bear and a kite " * 9)
    found = verify(adapter, BASE, texts, "cpu", "float32")
    assert found.prompts == 2
    assert found.effect > 1
    assert found.largest < 1e-4 and found.base_largest < 1e-4
    assert found.within(1e-4) and not found.within(1e-9)


def test_the_base_is_gone_when_the_library_loads_it_again(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    left: list[Any] = []

    def load_base(*given: str) -> Any:
        base = own_load(*given)
        loaded.append(weakref.ref(base.model))
        return base

    def reference(*given: Any) -> Any:
        left.extend(model() for model in loaded)
        return own_reference(*given)

    own_load, own_reference = run.load_base, run.reference
    monkeypatch.setattr(run, "load_base", load_base)
    monkeypatch.setattr(run, "reference", reference)
    verify(adapter, BASE, ("good morning",), "cpu", "float32")
    assert left == [None]


@pytest.mark.parametrize(
    ("base", "auto_class", "task"),
    [
        ("llama", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("llama", "AutoModelForTokenClassification", "TOKEN_CLS"),
        ("llama", "AutoModel", "FEATURE_EXTRACTION"),
        ("bert", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("bert", "AutoModelForTokenClassification", "TOKEN_CLS"),
        ("bert", "AutoModel", "FEATURE_EXTRACTION"),
        # It does not tell; beside a decoder, it would generate.
        ("bert", "AutoModelForMaskedLM", None),
    ],
)
def test_scores_and_embeddings_are_compared_where_nothing_is_generated(
    base: str, auto_class: str, task: str | None, bert: str, tmp_path: Path
) -> None:
    model = {"llama": BASE, "bert": bert}[base]
    targets = {"llama": ["q_proj", "down_proj"], "bert": ["query", "intermediate.dense"]}[base]
    config = peft.LoraConfig(task_type=task, r=4, target_modules=targets)
    folder = trained(tmp_path, model, auto_class, config)
    # An encoder takes no part of a prompt, however long it is.
    texts = ("good morning\n", "kite " * (45 if base == "llama" else 300))
    found = verify(folder, model, texts, "cpu", "float32")
    scored = task in ("SEQ_CLS", "TOKEN_CLS")
    assert found.compared == ("logits" if scored else "embeddings", "embeddings")
    assert found.same_choice is None and (found.effect is None) == scored
    assert scored or found.effect > 0.1
    assert found.within(1e-4) and not found.within(1e-9)


def test_an_own_adapter_of_an_encoder_is_reconstructed(bert: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"deltamux_type": "delta", "version": 1}')
    name = "bert.encoder.layer.1.attention.self.query.weight.value"
    save_file({name: torch.randn(32, 32)}, tmp_path / "adapter_model.safetensors")
    found = verify(tmp_path, bert, sample_texts(None), "cpu", "float32")
    assert found.compared == ("embeddings", "embeddings")
    assert found.effect > 0.01 and found.within(1e-4)


def test_a_model_is_resized_for_an_adapter_that_knows_more_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    model.resize_token_embeddings(262, mean_resizing=False)
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, lora).save_pretrained(tmp_path)
    found = verify(tmp_path, BASE, ("good morning\n",), "cpu", "float32")
    assert found.effect > 1 and found.within(1e-4)
