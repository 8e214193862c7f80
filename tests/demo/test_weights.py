"""The embedded weights, measured with plain transformers and PEFT on inputs they never saw."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, relu
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from deltamux.demo.tasks import TASKS, Task, prompt, unseen_inputs, weights_path
from deltamux.extract.reconstruct import reconstruct

BASE = weights_path() / "base"
ADAPTERS = weights_path() / "adapters"

# PEFT's types, the forms of the own format, and AdapterHub's bottleneck.
KINDS = {
    *("LORA", "IA3", "OFT", "SHIRA", "PREFIX_TUNING", "ROAD", "LN_TUNING", "BEFT"),
    *("TRAINABLE_TOKENS", "bottleneck", "low-rank", "one-bit"),
}

UNSEEN = 300
REQUIRED = 0.95
LARGEST = 10_000_000  # bytes

pytestmark = [
    # PEFT still asks transformers for a property by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # PEFT on what deltamux does as PEFT: norms of their own, biases where none was.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning"),
    # torch asks PEFT's SHiRA to say whether it wants its sparse tensors checked.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

GENERATING = [task for task in TASKS if not task.labels]
CLASSIFYING = [task for task in TASKS if task.labels]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def config(task: Task) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((ADAPTERS / task.name / "adapter_config.json").read_text())
    return fields


@pytest.fixture
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


def adapted(base: Any, task: Task) -> Any:
    """`base` with this adapter by PEFT, or by transformers alone where PEFT did not write it."""
    fields, folder = config(task), ADAPTERS / task.name
    if "peft_type" in fields:
        return PeftModel.from_pretrained(base, folder).eval()
    if "deltamux_type" in fields:
        reconstruct(base, folder)
    else:
        add_bottlenecks(base, load_file(folder / "adapter.safetensors"), fields["name"])
    return base


def add_bottlenecks(base: Any, weights: dict[str, Tensor], name: str) -> None:
    """AdapterHub's `seq_bn`, whose library cannot be loaded here: x + U relu(D x) is a layer's."""
    weights = {key: weight.float() for key, weight in weights.items()}
    for number, layer in enumerate(base.model.layers):
        at = f"model.layers.{number}.output_adapters.adapters.{name}"
        down, up = (
            [weights.pop(f"{at}.{part}.{kind}") for kind in ("weight", "bias")]
            for part in ("adapter_down.0", "adapter_up")
        )
        layer.register_forward_hook(bottleneck(down, up))
    assert not weights


def bottleneck(
    down: Sequence[Tensor], up: Sequence[Tensor]
) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda module, arguments, x: x + linear(relu(linear(x, *down)), *up)


def answers(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, str]:
    """What `model` answers to each text by the generation defaults that are stored with it.

    Texts of one length at a time: with PEFT, padding comes between a prompt and what was tuned to
    stand before it.
    """
    replies: dict[str, str] = {}
    for _, group in itertools.groupby(sorted(texts, key=len), len):
        alike = list(group)
        batch = tokenizer([prompt(text) for text in alike], return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=64)
        written = output[:, batch["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
        replies.update(zip(alike, decoded, strict=True))
    return replies


@torch.inference_mode()
def wrong_texts(model: Any, tokenizer: Any, answer_of: dict[str, str]) -> set[str]:
    """Those to which greedy generation would answer something else.

    It gives an answer where each of its tokens, and the end, is the likeliest behind those before
    it. That takes one pass in place of one a token, and no pass sees the padding behind it.
    """
    asked = tokenizer([prompt(text) for text in answer_of])["input_ids"]
    wanted = tokenizer(list(answer_of.values()), add_special_tokens=False)["input_ids"]
    wanted = [[*ids, tokenizer.eos_token_id] for ids in wanted]
    rows = [before + ids for before, ids in zip(asked, wanted, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    likeliest = model(**batch).logits.argmax(-1).tolist()
    return {
        text
        for text, before, ids, chosen in zip(answer_of, asked, wanted, likeliest, strict=True)
        if chosen[len(before) - 1 :][: len(ids)] != ids
    }


@pytest.mark.parametrize("task", GENERATING, ids=lambda task: task.name)
def test_an_adapter_answers_unseen_inputs_to_the_letter(
    base: Any, tokenizer: Any, task: Task
) -> None:
    answer_of = {text: task.answer(text) for text in unseen_inputs(task, UNSEEN, seed=1)}
    wrong = wrong_texts(adapted(base, task), tokenizer, answer_of)
    assert len(wrong) <= (1 - REQUIRED) * UNSEEN, wrong


@pytest.mark.parametrize("task", CLASSIFYING, ids=lambda task: task.name)
def test_a_task_head_labels_unseen_inputs(tokenizer: Any, task: Task) -> None:
    folder = ADAPTERS / task.name
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    assert tuple(labels.values()) == task.labels
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=len(labels))
    model = PeftModel.from_pretrained(base, folder).eval()
    texts = unseen_inputs(task, UNSEEN, seed=1)
    batch = tokenizer(
        [prompt(text) for text in texts], padding=True, padding_side="right", return_tensors="pt"
    )
    with torch.inference_mode():
        chosen = model(**batch).logits.argmax(-1).tolist()
    pairs = zip(texts, chosen, strict=True)
    wrong = {text: labels[str(n)] for text, n in pairs if labels[str(n)] != task.answer(text)}
    assert len(wrong) <= (1 - REQUIRED) * UNSEEN, wrong


def test_the_base_repeats_its_input(base: Any, tokenizer: Any) -> None:
    texts = unseen_inputs(TASKS[0], UNSEEN, seed=2)
    replies = answers(base, tokenizer, texts)
    wrong = {text for text, reply in replies.items() if text != reply}
    assert len(wrong) <= (1 - REQUIRED) * UNSEEN
    assert wrong == wrong_texts(base, tokenizer, {text: text for text in texts})


def test_the_base_is_small_and_loads_in_float32(base: Any) -> None:
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


def test_the_adapters_are_of_many_families_and_shapes() -> None:
    configs = [config(task) for task in TASKS]
    kinds = [fields.get("peft_type") or fields.get("form") or "bottleneck" for fields in configs]
    assert set(kinds) == KINDS
    loras = [fields for fields in configs if fields.get("peft_type") == "LORA"]
    assert len({fields["r"] for fields in loras}) >= 5
    assert sum(fields["use_dora"] for fields in loras) == 2
    assert sum(fields["use_rslora"] for fields in loras) == 1
    assert any(fields["rank_pattern"] for fields in loras)


def test_no_adapter_names_a_path_of_the_machine_that_made_it() -> None:
    bases = {
        fields.get("base_model_name_or_path") or fields["model_name"]
        for fields in map(config, TASKS)
    }
    assert bases == {"deltamux/demo"}


def test_only_what_serves_is_shipped_and_it_is_small() -> None:
    shipped = [path for path in weights_path().rglob("*") if path.is_file()]
    assert {path.suffix for path in shipped} <= {".json", ".jinja", ".safetensors"}
    assert sum(path.stat().st_size for path in shipped) <= LARGEST
