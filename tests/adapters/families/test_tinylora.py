"""TinyLoRA against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_mixed_squares_beside_lora(
    name: str, saved: bool, tune: Make, save: Make, as_in_peft: Make
) -> None:
    shared = {"target_modules": TARGETS[name], "save_projection": saved}
    configs = [
        peft.TinyLoraConfig(r=2, u=9, **shared),
        peft.TinyLoraConfig(r=4, u=5, weight_tying=0.6, projection_seed=7, **shared),
        peft.TinyLoraConfig(r=3, u=30, weight_tying=1.0, **shared),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, target_modules=TARGETS[name])])


def test_what_the_seed_draws_is_frozen(tune: Make, serve: Make, rewrite: Make) -> None:
    """A torch that drew other numbers would answer wrong: here are those of PEFT 0.21."""

    def ones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.eye(*tensor.shape) if tensor.ndim == 2 else torch.ones_like(tensor)
            for name, tensor in tensors.items()
        }

    config = peft.TinyLoraConfig(u=1, target_modules=["q_proj"], save_projection=False)
    adapter = serve("llama").parse(rewrite(tune("llama", config), ones))
    (payload,) = adapter.payloads["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(payload.b.T[:2], torch.tensor(GOLDEN), atol=1e-6, rtol=0)


GOLDEN = [[-0.458489, -0.499105], [0.454824, 1.045669]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 3}, "BASE_MISMATCH"),
        ({"u": 4}, "BASE_MISMATCH"),
        ({"weight_tying": 0.5}, "EXTRA_TENSORS"),
        ({"weight_tying": 1.5}, "BAD_FIELD"),
        ({"save_projection": False}, "EXTRA_TENSORS"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "UNSUPPORTED_FEATURE"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder = tune("llama", peft.TinyLoraConfig(r=2, u=9, target_modules=TARGETS["llama"]))
    assert refusal("llama", folder, **changes).reason == reason
