"""LoRA and IA3 of AdapterHub against the logits that it gave, kept in tests/peers/adapterhub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Make = Callable[..., Any]

GOLDENS = Path(__file__).parents[2] / "peers" / "adapterhub"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_both_answer_as_in_adapterhub(name: str, serve: Make, golden: Make) -> None:
    """In one batch with a bottleneck, and a row without adapter first."""
    served, expected = serve(f"adapterhub/{name}"), golden(name)
    adapters = ["lora", "ia3", "pfeiffer"]
    loaded = [served.load(slot, GOLDENS / name / a) for slot, a in enumerate(adapters)]
    assert [(a.family, a.rank) for a in loaded[:2]] == [("lora", 3), ("ia3", 0)]
    mixed = served.logits(expected["ids"].expand(4, -1), [None, 0, 1, 2])
    for row, adapter in zip(mixed, ["base", *adapters], strict=True):
        torch.testing.assert_close(row, expected[adapter][0], atol=3e-5, rtol=1e-5, msg=adapter)


@pytest.mark.parametrize(
    ("version", "factor"),
    [
        ("adapters.1.0.1", 0.5),
        ("adapters.0.0.0.dev1", 0.5),
        ("adapters.1.1.0.dev0", 0.5),
        ("adapters.1.1.0", 1),
        ("3.2.1", 1),
    ],
)
def test_before_1_1_the_scale_was_one(
    version: str, factor: float, changed: Make, serve: Make
) -> None:
    """r = 3 and alpha = 6 in the file."""
    served = serve("adapterhub/llama")
    told = served.parse(GOLDENS / "llama" / "lora").payloads
    meant = served.parse(changed("lora", {"version": version})).payloads
    for name, (payload,) in told.items():
        torch.testing.assert_close(meant[name][0].b, payload.b * factor)


@pytest.mark.parametrize("adapter", ["mtl_lora", "lora_and_houlsby"])
def test_no_other_method_is_corrected(adapter: str, changed: Make, serve: Make) -> None:
    served = serve("adapterhub/llama")
    told = served.parse(GOLDENS / "llama" / adapter).payloads
    old = served.parse(changed(adapter, {"version": "adapters.1.0.1"})).payloads
    for name, payloads in told.items():
        for payload, same in zip(payloads, old[name], strict=True):
            for tensor, other in zip(payload.tensors, same.tensors, strict=True):
                assert torch.equal(tensor, other)


@pytest.mark.parametrize("version", ["adapters.x", 1])
def test_a_version_that_is_none_is_refused(
    version: object, changed: Make, serve: Make, reason: Make
) -> None:
    folder = changed("lora", {"version": version})
    assert reason(serve("adapterhub/llama"), folder) == "BAD_FIELD"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_gating": True}, "UNSUPPORTED_FEATURE"),
        ({"vera_d": 1}, "UNSUPPORTED_FEATURE"),
        ({"dtype": "float16"}, "UNSUPPORTED_FEATURE"),
        ({"composition_mode": "multiply"}, "UNSUPPORTED_TYPE"),
        ({"composition_mode": "scale"}, "BAD_FIELD"),
        ({"attn_matrices": ["q", "o"]}, "BAD_FIELD"),
        ({"attn_matrices": ["q"]}, "EXTRA_TENSORS"),
        ({"leave_out": []}, "MISSING_TENSORS"),
        ({"leave_out": [0, 1]}, "NO_TARGETS"),
        ({"r": 4}, "BASE_MISMATCH"),
        ({"alpha": 0}, "BAD_FIELD"),
        ({"mystery": 1}, "UNKNOWN_FIELD"),
    ],
    ids=str,
)
def test_what_the_config_asks_for_is_served_or_refused(
    fields: dict[str, Any], expected: str, changed: Make, serve: Make, reason: Make
) -> None:
    assert reason(serve("adapterhub/llama"), changed("lora", **fields)) == expected


def test_a_head_saved_beside_is_the_adapter_s_own(changed: Make, serve: Make, golden: Make) -> None:
    served, expected = serve("adapterhub/llama"), golden("llama")
    head = {"lm_head.weight": served.base.lm_head.weight * 2}
    served.load(0, changed("lora", more=head))
    logits = served.logits(expected["ids"], [0])[0]
    torch.testing.assert_close(logits, expected["lora"][0] * 2, atol=3e-5, rtol=1e-5)


def test_a_module_for_all_three_takes_another_form(
    changed: Make, serve: Make, reason: Make
) -> None:
    folder = changed("lora", {"model_type": "gpt2"})
    assert reason(serve("adapterhub/gpt2"), folder) == "UNSUPPORTED_FEATURE"
