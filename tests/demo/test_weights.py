"""The embedded weights, measured with plain transformers and PEFT on inputs they never saw."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.demo.tasks import TASKS, Task, prompt, unseen_inputs, weights_path
from deltamux.extract.reconstruct import reconstruct

BASE = weights_path() / "base"
ADAPTERS = weights_path() / "adapters"

UNSEEN = 300
REQUIRED = 0.95
LARGEST = 8_000_000  # bytes

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def config(task: Task) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((ADAPTERS / task.name / "adapter_config.json").read_text())
    return fields


OF_PEFT = [task for task in TASKS if "peft_type" in config(task)]


@pytest.fixture(scope="module")
def model() -> Any:
    base = AutoModelForCausalLM.from_pretrained(BASE)
    first, *others = (task.name for task in OF_PEFT)
    model = PeftModel.from_pretrained(base, ADAPTERS / first, adapter_name=first)
    for name in others:
        model.load_adapter(ADAPTERS / name, adapter_name=name)
    return model.eval()


def answers(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """What `model` answers to `texts` by the generation defaults that are stored with it."""
    batch = tokenizer(
        [prompt(text) for text in texts], padding=True, padding_side="left", return_tensors="pt"
    )
    output = model.generate(**batch, max_new_tokens=64)
    replies: list[str] = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return replies


@every_task
def test_an_adapter_answers_unseen_inputs_to_the_letter(
    model: Any, tokenizer: Any, task: Task
) -> None:
    texts = unseen_inputs(task, UNSEEN, seed=1)
    if task in OF_PEFT:
        model.set_adapter(task.name)
    else:
        model = AutoModelForCausalLM.from_pretrained(BASE).eval()
        reconstruct(model, ADAPTERS / task.name)
    pairs = zip(texts, answers(model, tokenizer, texts), strict=True)
    wrong = {text: reply for text, reply in pairs if reply != task.answer(text)}
    assert len(wrong) <= (1 - REQUIRED) * UNSEEN, wrong


def test_the_base_repeats_its_input(model: Any, tokenizer: Any) -> None:
    texts = unseen_inputs(TASKS[0], UNSEEN, seed=2)
    with model.disable_adapter():
        replies = answers(model, tokenizer, texts)
    assert sum(map(str.__eq__, replies, texts)) >= REQUIRED * UNSEEN


def test_the_base_is_small_and_loads_in_float32(model: Any) -> None:
    base = model.get_base_model()
    assert base.dtype == torch.float32
    assert base.config.architectures == ["LlamaForCausalLM"]


def test_a_chat_is_the_prompt_of_its_last_message(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "quick blue fox"},
    ]
    templated = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert templated["input_ids"] == tokenizer(prompt("quick blue fox"))["input_ids"]


@pytest.mark.parametrize("text", ["quick blue fox", "  two  spaces ", "\t\n~", "café → 日本"])
def test_the_tokenizer_has_a_token_for_every_byte(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_adapters_are_of_many_shapes() -> None:
    configs = [config(task) for task in OF_PEFT]
    assert len({config["r"] for config in configs}) >= 5
    assert sum(config["use_dora"] for config in configs) == 2
    assert sum(config["use_rslora"] for config in configs) == 1
    assert any(config["rank_pattern"] for config in configs)
    assert {config(task)["base_model_name_or_path"] for task in TASKS} == {"deltamux/demo"}
    assert [config(task)["form"] for task in TASKS if task not in OF_PEFT] == ["low-rank"]


def test_only_what_serves_is_shipped_and_it_is_small() -> None:
    shipped = [path for path in weights_path().rglob("*") if path.is_file()]
    assert {path.suffix for path in shipped} <= {".json", ".jinja", ".safetensors"}
    assert sum(path.stat().st_size for path in shipped) <= LARGEST
