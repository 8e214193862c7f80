"""MTL-LoRA of AdapterHub against the logits that it gave, kept in tests/peers/adapterhub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Make = Callable[..., Any]

GOLDENS = Path(__file__).parents[2] / "peers" / "adapterhub"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_task_answers_as_in_adapterhub(name: str, serve: Make, golden: Make) -> None:
    """In one batch with LoRA, and a row without adapter first."""
    served, expected = serve(f"adapterhub/{name}"), golden(name)
    for slot, adapter in enumerate(["mtl_lora", "lora"]):
        loaded = served.load(slot, GOLDENS / name / adapter)
        assert (loaded.family, loaded.rank) == (adapter, 3)
    mixed = served.logits(expected["ids"].expand(3, -1), [None, 0, 1])
    for row, adapter in zip(mixed, ["base", "mtl_lora", "lora"], strict=True):
        torch.testing.assert_close(row, expected[adapter][0], atol=3e-5, rtol=1e-5, msg=adapter)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_gating": True}, "UNSUPPORTED_FEATURE"),
        ({"use_dora": True}, "UNSUPPORTED_FEATURE"),
        ({"task_specific_matrix_type": "linear"}, "UNSUPPORTED_FEATURE"),
        ({"weights_sharpness": 0}, "BAD_FIELD"),
        ({"n_up_projection": 3}, "BASE_MISMATCH"),
        ({"n_up_projection": 0}, "BAD_FIELD"),
        ({"output_lora": False}, "EXTRA_TENSORS"),
        ({"r": 4}, "BASE_MISMATCH"),
        ({"mystery": 1}, "UNKNOWN_FIELD"),
    ],
    ids=str,
)
def test_what_the_config_asks_for_is_served_or_refused(
    fields: dict[str, Any], expected: str, changed: Make, serve: Make, reason: Make
) -> None:
    assert reason(serve("adapterhub/llama"), changed("mtl_lora", **fields)) == expected
