"""VeRA of AdapterHub against the logits that it gave, kept in tests/peers/adapterhub."""

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
    """In one batch with IA3, and a row without adapter first."""
    served, expected = serve(f"adapterhub/{name}"), golden(name)
    for slot, (adapter, rank) in enumerate([("vera", 3), ("ia3", 0)]):
        loaded = served.load(slot, GOLDENS / name / adapter)
        assert (loaded.family, loaded.rank) == (adapter, rank)
    mixed = served.logits(expected["ids"].expand(3, -1), [None, 0, 1])
    for row, adapter in zip(mixed, ["base", "vera", "ia3"], strict=True):
        torch.testing.assert_close(row, expected[adapter][0], atol=3e-5, rtol=1e-5, msg=adapter)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_gating": True}, "UNSUPPORTED_FEATURE"),
        ({"use_dora": True}, "UNSUPPORTED_FEATURE"),
        ({"vera_d": None}, None),
        ({"vera_d": None, "vera_b": None}, "MISSING_TENSORS"),
        ({"attn_matrices": ["q", "v"]}, "UNSUPPORTED_FEATURE"),
        ({"leave_out": [0]}, "EXTRA_TENSORS"),
        ({"leave_out": [0, 1]}, "NO_TARGETS"),
        ({"r": 4}, "BASE_MISMATCH"),
        ({"mystery": 1}, "UNKNOWN_FIELD"),
    ],
    ids=str,
)
def test_what_the_config_asks_for_is_served_or_refused(
    fields: dict[str, Any], expected: str | None, changed: Make, serve: Make, reason: Make
) -> None:
    assert reason(serve("adapterhub/llama"), changed("vera", **fields)) == expected
