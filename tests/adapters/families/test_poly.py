"""Poly and MHR of one task against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]

TARGETS = ["q_proj", "v_proj", "down_proj"]


def poly(**fields: Any) -> peft.PolyConfig:
    # Without a task type PEFT does not hand task ids on.
    return peft.PolyConfig(
        r=3, target_modules=TARGETS, init_weights=False, task_type="CAUSAL_LM", **fields
    )


def test_the_mixture_of_the_only_task_beside_lora(
    tune: Make, save: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    """Skills are one at least, and in two splits or four (MHR) weighed for each."""
    configs = [poly(n_skills=2), poly(n_skills=3, n_splits=2), poly(n_skills=1, n_splits=4)]
    folders = [tune("llama", config, seed) for seed, config in enumerate(configs)]
    lora = save("llama", r=4, target_modules=TARGETS)
    served = serve("llama")
    for slot, folder in enumerate([*folders, lora]):
        assert served.load(slot, folder).rank == (4 if folder is lora else 3)
    mixed = served.logits(ids, [None, 0, 1, 2, 3])
    task = {"task_ids": torch.zeros(1, dtype=torch.long)}
    plain = served.logits(ids, [None] * 5)
    torch.testing.assert_close(mixed[0], plain[0], atol=0, rtol=0)
    for row, folder in enumerate([*folders, lora], start=1):
        options = {} if folder is lora else task
        expected = reference("llama", folder, ids[row : row + 1], **options)[0]
        assert (expected - plain[row]).abs().max() > 0.1
        torch.testing.assert_close(mixed[row], expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_tasks": 2}, "UNSUPPORTED_FEATURE"),
        ({"n_skills": 3}, "BASE_MISMATCH"),
        ({"n_skills": 0}, "BAD_FIELD"),
        ({"n_splits": 3}, "BASE_MISMATCH"),
        ({"r": 4}, "BASE_MISMATCH"),
        ({"poly_type": "mhr"}, "BAD_FIELD"),
        ({"target_modules": ["q_proj"]}, "EXTRA_TENSORS"),
        ({"alpha": 2}, "UNKNOWN_FIELD"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder = tune("llama", poly(n_skills=2, n_splits=2))
    assert refusal("llama", folder, **changes).reason == reason


def test_the_logits_of_other_tasks_are_refused(tune: Make, refusal_of_part: Make) -> None:
    folder = tune("llama", poly())
    error = refusal_of_part("llama", folder, "module_logits", lambda logits: logits.repeat(2, 1))
    assert error.reason == "BASE_MISMATCH"
