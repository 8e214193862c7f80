"""What checkpoints of classifiers are read as; what they compute is tests/engine/test_pooler.py."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor

from deltamux.adapters.checkpoint.files import CONFIG, MODEL_CONFIG
from deltamux.adapters.task import Call, require_fit
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]
WEIGHT = "base_model.model.score.weight"
AUTO = {
    "SEQ_CLS": hf.AutoModelForSequenceClassification,
    "TOKEN_CLS": hf.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": hf.AutoModel,
}


@pytest.fixture
def classifier(base: Make, tmp_path: Path) -> Make:
    """classifier(base, task, PeftConfig, **labels) -> a folder, as PEFT saves it."""

    def classifier(name: str, task: str, config: peft.PeftConfig, **labels: Any) -> Path:
        shape = base(name).config.to_dict() | labels
        model = AUTO[task].from_config(type(base(name).config)(**shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.get_peft_model(model, config).save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return classifier


def lora(task: str | None, **fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(task_type=task, **{"r": 2, "target_modules": ["q_proj"], **fields})


@pytest.mark.parametrize(
    ("name", "task", "config", "level", "biases"),
    [
        ("llama", "SEQ_CLS", lora("SEQ_CLS"), "sequence", 0),
        ("qwen3", "TOKEN_CLS", lora("TOKEN_CLS"), "token", 1),
        ("gpt2", "SEQ_CLS", lora("SEQ_CLS", target_modules=["c_attn"]), "sequence", 0),
        ("gpt_neox", "TOKEN_CLS", lora("TOKEN_CLS", target_modules=["dense"]), "token", 1),
        ("llama", "SEQ_CLS", lora("SEQ_CLS", target_modules="all-linear"), "sequence", 0),
        ("llama_bias", "SEQ_CLS", lora("SEQ_CLS", bias="all"), "sequence", 0),
        ("llama", "SEQ_CLS", lora(None, modules_to_save=["score", "k_proj"]), "sequence", 0),
        ("gpt2", "TOKEN_CLS", lora("TOKEN_CLS", bias="all", target_modules=["c_attn"]), "token", 1),
        ("llama", "SEQ_CLS", peft.IA3Config(task_type="SEQ_CLS"), "sequence", 0),
        ("llama", "SEQ_CLS", peft.LNTuningConfig(task_type="SEQ_CLS"), "sequence", 0),
    ],
)
def test_heads_of_all_decoders_are_taken_apart(
    name: str,
    task: str,
    config: peft.PeftConfig,
    level: str,
    biases: int,
    classifier: Make,
    serve: Make,
) -> None:
    adapter = serve(name).parse(classifier(name, task, config, num_labels=4))
    assert adapter.task == level
    assert adapter.head.plan.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    assert [weight.shape for weight in adapter.head.weights] == [(4, 32)]
    assert [bias.shape for bias in adapter.head.biases] == [(4,)] * biases
    assert "lm_head" not in adapter.payloads
    numbers = sum(t.numel() for site in adapter.payloads.values() for p in site for t in p.tensors)
    assert adapter.parameters >= numbers + 4 * 32
    assert adapter.host_bytes == (numbers + 4 * 32 + 4 * biases) * 4


def test_an_adapter_of_a_model_without_a_head_is_the_same_inside_one(
    classifier: Make, serve: Make
) -> None:
    config = lora("FEATURE_EXTRACTION", target_modules="all-linear")
    adapter = serve("llama").parse(classifier("llama", "FEATURE_EXTRACTION", config))
    assert (adapter.task, adapter.head) == ("features", None)
    assert len(adapter.payloads) == 14
    assert all(site.startswith("model.layers.") for site in adapter.payloads)


def test_labels_and_scores_are_those_of_the_base_where_it_has_as_many(
    base: Make, classifier: Make, serve: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = base("llama").config
    monkeypatch.setattr(config, "id2label", {1: "spam", 0: "ham"})
    monkeypatch.setattr(config, "problem_type", "multi_label_classification")
    served = serve("llama")
    two = served.parse(classifier("llama", "SEQ_CLS", lora("SEQ_CLS"), num_labels=2)).head.plan
    three = served.parse(classifier("llama", "SEQ_CLS", lora("SEQ_CLS"), num_labels=3)).head.plan
    one = served.parse(classifier("llama", "SEQ_CLS", lora("SEQ_CLS"), num_labels=1)).head.plan
    assert (two.labels, two.scoring) == (("ham", "spam"), "sigmoid")
    assert (three.labels, three.scoring) == (("LABEL_0", "LABEL_1", "LABEL_2"), "softmax")
    assert (one.labels, one.scoring) == (("LABEL_0",), "none")


def configured(folder: Path, **fields: object) -> Path:
    (folder / MODEL_CONFIG).write_text(json.dumps(fields))
    return folder


def test_a_config_beside_the_adapter_says_more_than_the_base(classifier: Make, serve: Make) -> None:
    folder = classifier("llama", "SEQ_CLS", lora("SEQ_CLS"), num_labels=3)
    names = {"2": "late", "0": "early", "1": "in time"}
    fields = {"id2label": names, "problem_type": "multi_label_classification", "pad_token_id": 7}
    plan = serve("llama").parse(configured(folder, **fields, hidden_size=32)).head.plan
    assert (plan.labels, plan.scoring) == (("early", "in time", "late"), "sigmoid")
    assert plan.pad_token_id == 7
    bare = serve("llama").parse(configured(folder, vocab_size=61)).head.plan
    assert (bare.labels[2], bare.scoring, bare.pad_token_id) == ("LABEL_2", "softmax", None)


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": {"0": "a", "1": "b"}},
        {"id2label": {"0": "a", "1": "b", "3": "c"}},
        {"id2label": {"0": "a", "1": "b", "2": 3}},
        {"id2label": ["a", "b", "c"]},
        {"problem_type": "guess"},
        {"pad_token_id": "x"},
    ],
)
def test_a_config_that_does_not_fit_the_head_is_refused(
    fields: dict[str, object], classifier: Make, serve: Make
) -> None:
    folder = classifier("llama", "SEQ_CLS", lora("SEQ_CLS"), num_labels=3)
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(configured(folder, **fields))
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "BAD_FIELD")


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != WEIGHT}


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no head": (without, "MISSING_TENSORS"),
    "of another width": (lambda t: t | {WEIGHT: t[WEIGHT][:, 1:]}, "BASE_MISMATCH"),
    "a vector": (lambda t: t | {WEIGHT: t[WEIGHT][0]}, "SHAPE_MISMATCH"),
    "integers": (lambda t: t | {WEIGHT: t[WEIGHT].long()}, "MALFORMED_WEIGHTS"),
    "a bias that such heads do not have": (
        lambda t: t | {"base_model.model.score.bias": torch.ones(2)},
        "EXTRA_TENSORS",
    ),
    "LoRA at the head": (
        lambda t: t | {"base_model.model.score.lora_A.weight": torch.ones(2, 32)},
        "BASE_MISMATCH",
    ),
    "a language head beside it": (
        lambda t: t | {"base_model.model.lm_head.weight": torch.ones(61, 32)},
        "EXTRA_TENSORS",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_heads_are_refused(name: str, classifier: Make, serve: Make, rewrite: Make) -> None:
    change, reason = BROKEN[name]
    folder = classifier("llama", "SEQ_CLS", lora("SEQ_CLS"))
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(rewrite(folder, change))
    assert caught.value.reason == reason


@pytest.mark.parametrize("length", [4, 6])
def test_a_bias_has_a_number_for_each_label(
    length: int, classifier: Make, serve: Make, rewrite: Make
) -> None:
    folder = classifier("llama", "TOKEN_CLS", lora("TOKEN_CLS"), num_labels=5)
    bias = {"base_model.model.score.bias": torch.ones(length)}
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(rewrite(folder, lambda tensors: tensors | bias))
    assert caught.value.reason == "SHAPE_MISMATCH"


def test_a_head_that_overflows_the_serving_dtype_is_refused(
    classifier: Make, serve: Make, rewrite: Make
) -> None:
    folder = classifier("llama", "SEQ_CLS", lora("SEQ_CLS"))
    huge = rewrite(folder, lambda tensors: tensors | {WEIGHT: tensors[WEIGHT] + 1e6})
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(huge, torch.float16)
    assert caught.value.reason == "NON_FINITE"


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "QUESTION_ANS", 3, ["SEQ_CLS"]])
def test_other_tasks_are_refused(task: object, classifier: Make, serve: Make) -> None:
    folder = classifier("llama", "SEQ_CLS", lora("SEQ_CLS"))
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | {"task_type": task}))
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(folder)
    assert caught.value.reason == "UNSUPPORTED_FEATURE"


@pytest.mark.parametrize(
    ("task", "call", "reason"),
    [
        ("sequence", "Generate", "NO_GENERATION"),
        ("token", "Generate", "NO_GENERATION"),
        ("features", "Generate", "NO_GENERATION"),
        ("generation", "Classify", "NO_TASK_HEAD"),
        ("features", "Classify", "NO_TASK_HEAD"),
    ],
)
def test_an_adapter_answers_only_what_it_was_trained_for(
    task: str, call: Call, reason: str
) -> None:
    with pytest.raises(DeltamuxError) as caught:
        require_fit(task, call)
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", reason)


def test_every_adapter_embeds() -> None:
    for task in ("generation", "features", "sequence", "token"):
        require_fit(task, "Embed")
    require_fit("generation", "Generate")
    require_fit("sequence", "Classify")
    require_fit("token", "Classify")
