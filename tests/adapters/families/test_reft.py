"""LoReFT of AdapterHub against the logits that it gave, kept in tests/peers/adapterhub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Make = Callable[..., Any]

GOLDENS = Path(__file__).parents[2] / "peers" / "adapterhub"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_acts_on_the_first_tokens_alone(name: str, paged_as_golden: Make) -> None:
    """In chunks, some of which end before its three tokens or five do, beside a bottleneck."""
    folders = [GOLDENS / name / adapter for adapter in ("loreft", "tied_loreft", "pfeiffer")]
    paged_as_golden(name, folders)


def test_what_such_an_adapter_is_said_to_be(serve: Make) -> None:
    adapter = serve("adapterhub/llama").parse(GOLDENS / "llama" / "loreft")
    assert (adapter.family, adapter.rank) == ("reft", 3)
    assert adapter.note == "acts on the first 3 tokens"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"orthogonality": False}, "UNSUPPORTED_FEATURE"),
        ({"suffix_positions": 1}, "UNSUPPORTED_FEATURE"),
        ({"output_reft": False}, "UNSUPPORTED_FEATURE"),
        ({"non_linearity": "relu"}, "UNSUPPORTED_FEATURE"),
        ({"dtype": "float16"}, "UNSUPPORTED_FEATURE"),
        ({"prefix_positions": 0}, "BAD_FIELD"),
        ({"layers": [1]}, "EXTRA_TENSORS"),
        ({"layers": [2]}, "NO_TARGETS"),
        ({"layers": "none"}, "BAD_FIELD"),
        ({"tied_weights": True}, "EXTRA_TENSORS"),
        ({"r": 4}, "BASE_MISMATCH"),
        ({"mystery": 1}, "UNKNOWN_FIELD"),
    ],
    ids=str,
)
def test_what_the_config_asks_for_is_served_or_refused(
    fields: dict[str, Any], expected: str, changed: Make, serve: Make, reason: Make
) -> None:
    assert reason(serve("adapterhub/llama"), changed("loreft", **fields)) == expected


@pytest.mark.parametrize(("factor", "expected"), [(1, None), (2, "UNSUPPORTED_FEATURE")])
def test_a_trained_head_would_be_asked_beyond_its_reach(
    factor: int, expected: str | None, changed: Make, serve: Make, reason: Make
) -> None:
    served = serve("adapterhub/llama")
    head = {"lm_head.weight": served.base.lm_head.weight * factor}
    assert reason(served, changed("loreft", more=head)) == expected


def test_layers_that_norm_last_go_on_with_another_state(
    changed: Make, serve: Make, reason: Make
) -> None:
    folder = changed("loreft", {"model_type": "bert"})
    assert reason(serve("adapterhub/bert"), folder) == "UNSUPPORTED_FEATURE"


def test_in_a_union_others_would_have_its_reach(changed: Make, serve: Make, reason: Make) -> None:
    config = json.loads((GOLDENS / "llama" / "loreft" / "adapter_config.json").read_text())[
        "config"
    ]
    union = {**dict.fromkeys(config), "architecture": "union", "configs": [config]}
    folder = changed("loreft", **union)
    assert reason(serve("adapterhub/llama"), folder) == "UNSUPPORTED_FEATURE"
