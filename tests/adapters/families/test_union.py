"""Unions of AdapterHub against the logits that it gave, kept in tests/peers/adapterhub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltamux.adapters.checkpoint.convert import convert

Make = Callable[..., Any]

GOLDENS = Path(__file__).parents[2] / "peers" / "adapterhub"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_mix_and_match_answers_as_in_adapterhub(
    name: str, tmp_path: Path, paged_as_golden: Make
) -> None:
    """A prefix and parallel bottlenecks, in chunks beside a bottleneck alone."""
    mam = convert(GOLDENS / name / "mam", tmp_path / "mam")
    paged_as_golden(name, [mam, GOLDENS / name / "parallel"])


def test_several_methods_at_one_module_answer_as_in_adapterhub(paged_as_golden: Make) -> None:
    """LoRA and a bottleneck behind it at the same module, beside each of the two methods alone."""
    folders = [GOLDENS / "llama" / name for name in ("lora_and_houlsby", "lora", "houlsby")]
    paged_as_golden("llama", folders)


def test_what_a_union_is_said_to_be(serve: Make) -> None:
    served = serve("adapterhub/llama")
    adapter = served.parse(GOLDENS / "llama" / "lora_and_houlsby")
    assert (adapter.family, adapter.rank) == ("union", 4)
    kinds = {type(p).__name__ for p in adapter.payloads["model.layers.0.mlp.down_proj"]}
    assert kinds == {"LowRank", "OutputBottleneck"}


MEMBERS: list[dict[str, Any]] = json.loads(
    (GOLDENS / "llama" / "lora_and_houlsby" / "adapter_config.json").read_text()
)["config"]["configs"]
LORA, HOULSBY = MEMBERS


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([HOULSBY, LORA], None),
        ([LORA], "EXTRA_TENSORS"),
        ([HOULSBY], "EXTRA_TENSORS"),
        ([LORA, HOULSBY, HOULSBY], "UNSUPPORTED_FEATURE"),
        ([LORA, {**HOULSBY, "use_gating": True}], "UNSUPPORTED_FEATURE"),
        ([LORA, {**HOULSBY, "mystery": 1}], "UNKNOWN_FIELD"),
        ([LORA, {"architecture": "union", "configs": [HOULSBY]}], "UNSUPPORTED_TYPE"),
        ([LORA, {"architecture": "mystery"}], "UNKNOWN_TYPE"),
        ([LORA, "houlsby"], "BAD_FIELD"),
        ([], "BAD_FIELD"),
        (LORA, "BAD_FIELD"),
    ],
    ids=lambda value: None if isinstance(value, list | dict) else str(value),
)
def test_members_are_served_or_refused(
    configs: object, expected: str | None, changed: Make, serve: Make, reason: Make
) -> None:
    folder = changed("lora_and_houlsby", configs=configs)
    assert reason(serve("adapterhub/llama"), folder) == expected


def test_members_are_named_alike(changed: Make, serve: Make, reason: Make) -> None:
    """AdapterHub reads a file as a bare model's or as that of one with a head."""

    def rename(name: str) -> str:
        return name.removeprefix("model.") if ".loras." in name else name

    folder = changed("lora_and_houlsby", tensors=rename)
    assert reason(serve("adapterhub/llama"), folder) == "EXTRA_TENSORS"


def test_names_of_functions_are_those_of_today(changed: Make, serve: Make) -> None:
    """In adapters older than versions AdapterHub translates them, but not inside a union."""
    configs = [LORA, {**HOULSBY, "non_linearity": "gelu"}]
    folder = changed("lora_and_houlsby", {"version": None}, configs=configs)
    payloads = serve("adapterhub/llama").parse(folder).payloads["model.layers.0.mlp.down_proj"]
    assert {getattr(payload, "activation", None) for payload in payloads} == {None, "gelu"}


def test_a_union_has_nothing_but_members(changed: Make, serve: Make, reason: Make) -> None:
    folder = changed("lora_and_houlsby", mystery=1)
    assert reason(serve("adapterhub/llama"), folder) == "UNKNOWN_FIELD"
