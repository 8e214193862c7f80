"""DoRA of AdapterHub against the logits that it gave, kept in tests/peers/adapterhub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Make = Callable[..., Any]

GOLDENS = Path(__file__).parents[2] / "peers" / "adapterhub"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_it_answers_as_in_adapterhub(name: str, serve: Make, golden: Make) -> None:
    """In one batch with LoRA, and a row without adapter first; the modules of bert have a bias."""
    served, expected = serve(f"adapterhub/{name}"), golden(name)
    for slot, adapter in enumerate(["dora", "lora"]):
        loaded = served.load(slot, GOLDENS / name / adapter)
        assert (loaded.family, loaded.rank) == (adapter, 3)
    mixed = served.logits(expected["ids"].expand(3, -1), [None, 0, 1])
    for row, adapter in zip(mixed, ["base", "dora", "lora"], strict=True):
        torch.testing.assert_close(row, expected[adapter][0], atol=3e-5, rtol=1e-5, msg=adapter)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_gating": True}, "UNSUPPORTED_FEATURE"),
        ({"use_dora": False}, "EXTRA_TENSORS"),
        ({"output_lora": False}, "EXTRA_TENSORS"),
        ({"r": 4}, "BASE_MISMATCH"),
        ({"mystery": 1}, "UNKNOWN_FIELD"),
    ],
    ids=str,
)
def test_what_the_config_asks_for_is_served_or_refused(
    fields: dict[str, Any], expected: str, changed: Make, serve: Make, reason: Make
) -> None:
    assert reason(serve("adapterhub/llama"), changed("dora", **fields)) == expected


def test_every_module_has_its_magnitude(changed: Make, serve: Make, reason: Make) -> None:
    folder = changed("lora", use_dora=True)
    assert reason(serve("adapterhub/llama"), folder) == "MISSING_TENSORS"
