"""Prefixes of AdapterHub against the logits that it gave, kept in tests/peers/adapterhub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamux.adapters.checkpoint.convert import convert

Make = Callable[..., Any]

GOLDENS = Path(__file__).parents[2] / "peers" / "adapterhub"
PREFIX = "model.prefix_tuning.prefix_tunings.prefix.self_prefix"


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Path]:
    """converted(adapter, base) -> its safetensors, which AdapterHub cannot write of prefixes."""
    return lambda name, base="llama": convert(GOLDENS / base / name, tmp_path / "kept" / name)


@pytest.fixture
def altered(converted: Make, changed: Make) -> Callable[..., Path]:
    """altered(...): as `changed`, of the prefix that comes out of a network."""
    folder = converted("prefix")
    return lambda *args, **options: changed(folder, *args, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_answers_as_in_adapterhub(name: str, converted: Make, paged_as_golden: Make) -> None:
    """In chunks beside a bottleneck; positions of gpt2 are rows of an embedding."""
    prefixes = [converted(adapter, name) for adapter in ("prefix", "flat_prefix")]
    paged_as_golden(name, [*prefixes, GOLDENS / name / "pfeiffer"])


def test_what_such_an_adapter_is_said_to_be(converted: Make, serve: Make) -> None:
    """The numbers that were trained, once: with each layer the file has them again."""
    adapter = serve("adapterhub/llama").parse(converted("prefix"))
    assert (adapter.family, adapter.note) == ("prefix_tuning", "3 virtual tokens")
    assert adapter.parameters == 3 * 32 + 6 * 32 + 6 + 64 * 6 + 64


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_gating": True}, "UNSUPPORTED_FEATURE"),
        ({"leave_out": [1]}, "UNSUPPORTED_FEATURE"),
        ({"non_linearity": "gelu"}, "UNSUPPORTED_FEATURE"),
        ({"non_linearity": None}, "BAD_FIELD"),
        ({"flat": True}, "MISSING_TENSORS"),
        ({"prefix_length": 4}, "BASE_MISMATCH"),
        ({"prefix_length": 0}, "BAD_FIELD"),
        ({"bottleneck_size": 7}, "BASE_MISMATCH"),
        ({"mystery": 1}, "UNKNOWN_FIELD"),
    ],
    ids=str,
)
def test_what_the_config_asks_for_is_served_or_refused(
    fields: dict[str, Any], expected: str, altered: Make, serve: Make, reason: Make
) -> None:
    assert reason(serve("adapterhub/llama"), altered(**fields)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{PREFIX}.wte.weight", "MALFORMED_WEIGHTS"),
        (f"model.layers.1.self_attn.prefix_tuning.pool.{PREFIX[20:]}.more", "MALFORMED_WEIGHTS"),
        (f"{PREFIX}.more", "EXTRA_TENSORS"),
    ],
)
def test_a_layer_s_copy_is_that_of_the_model(
    name: str, expected: str, altered: Make, serve: Make, reason: Make
) -> None:
    folder = altered(more={name: torch.ones(3, 32)})
    assert reason(serve("adapterhub/llama"), folder) == expected


def test_a_base_that_loses_sight_of_the_prefix_is_refused(
    altered: Make, serve: Make, reason: Make
) -> None:
    folder = altered({"model_type": "mistral"})
    assert reason(serve("adapterhub/mistral"), folder) == "UNSUPPORTED_FEATURE"


def test_a_base_that_only_reads_is_refused(altered: Make, serve: Make, reason: Make) -> None:
    served = serve("adapterhub/llama")
    served.structure = served.structure.headless()
    assert reason(served, altered()) == "UNSUPPORTED_FEATURE"
