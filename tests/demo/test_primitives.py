"""The adapters of the demo, taken together, use every primitive that its base has a place for."""

import pkgutil
from collections.abc import Sequence

import pytest
from transformers import AutoTokenizer

from deltamux.adapters import primitives
from deltamux.adapters.adapter import Adapter
from deltamux.adapters.parse import parse_adapter
from deltamux.base.load import load_base
from deltamux.demo.tasks import TASKS, prompt, weights_path

# What no adapter of this base can be made of: it has no experts; and token rows once more, behind
# the vocabulary, where the characters of the tasks do not lie.
ELSEWHERE = {"expert_low_rank", "added_tokens"}


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    base = load_base(str(weights_path() / "base"))
    folders = [weights_path() / "adapters" / task.name for task in TASKS]
    return [parse_adapter(folder, folder.name, base.structure, base.dtype) for folder in folders]


def test_every_primitive_is_used(adapters: Sequence[Adapter]) -> None:
    there = {module.name for module in pkgutil.iter_modules(primitives.__path__)} - {"payload"}
    payloads = [p for adapter in adapters for site in adapter.payloads.values() for p in site]
    parts = [*payloads, *(adapter.head for adapter in adapters if adapter.head)]
    used = {type(part).__module__.rpartition(".")[2] for part in parts}
    assert used == there - ELSEWHERE


def test_one_adapter_sleeps_until_the_prompt_ends(adapters: Sequence[Adapter]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(weights_path() / "base")
    end = tuple(tokenizer(prompt(""), add_special_tokens=False)["input_ids"])
    assert [adapter.invocation for adapter in adapters if adapter.invocation] == [end]
