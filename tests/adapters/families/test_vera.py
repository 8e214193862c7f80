"""VeRA and PVeRA against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from deltamux.adapters.parse import parse_adapter
from deltamux.base.structure import find_structure

Make = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
CONFIGS = [peft.VeraConfig, peft.PveraConfig]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("make", CONFIGS)
@pytest.mark.parametrize("name", TARGETS)
def test_shared_projections_beside_lora(
    name: str, make: Make, saved: bool, tune: Make, save: Make, as_in_peft: Make
) -> None:
    shared = {"target_modules": TARGETS[name], "save_projection": saved, "d_initial": 0.8}
    configs = [make(r=7, **shared), make(r=40, projection_prng_key=3, **shared)]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, target_modules=TARGETS[name])])


def test_trained_biases(tune: Make, as_in_peft: Make) -> None:
    config = peft.VeraConfig(
        r=9, target_modules=["q_proj", "o_proj"], d_initial=1.0, bias="vera_only"
    )
    as_in_peft("llama_bias", [tune("llama_bias", config)])


def test_what_the_seed_draws_is_frozen(tune: Make, serve: Make, rewrite: Make) -> None:
    """A torch that drew other numbers would answer wrong: here are those of PEFT 0.21."""

    def ones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.ones_like(tensor) for name, tensor in tensors.items()}

    config = peft.VeraConfig(
        r=2, target_modules=["q_proj"], projection_prng_key=11, save_projection=False
    )
    adapter = serve("llama").parse(rewrite(tune("llama", config), ones))
    (payload,) = adapter.payloads["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(payload.a[:, :3], torch.tensor(GOLDEN_A), atol=1e-6, rtol=0)
    torch.testing.assert_close(payload.b[:, :3], torch.tensor(GOLDEN_B), atol=1e-6, rtol=0)


def test_on_a_coarser_base_drawn_numbers_are_rounded_as_in_peft(base: Make, tune: Make) -> None:
    config = peft.VeraConfig(r=2, target_modules=["q_proj"], save_projection=False)
    folder = tune("llama", config)
    coarse = copy.deepcopy(base("llama")).bfloat16()
    adapter = parse_adapter(folder, "digest", find_structure(coarse), torch.float32)
    (payload,) = adapter.payloads["model.layers.0.self_attn.q_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(coarse, folder)
    module = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    expected = module.vera_A["default"] * module.vera_lambda_d["default"][:, None]
    torch.testing.assert_close(payload.a, expected, atol=1e-7, rtol=1e-6)


GOLDEN_A = [[-0.303939, -0.011645, 0.420595], [-0.221872, -0.140145, 0.333194]]
GOLDEN_B = [[0.933192, -1.287267, -0.310872], [1.045282, 0.650412, 0.501940]]


@pytest.mark.parametrize("make", CONFIGS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 6}, "BASE_MISMATCH"),
        ({"save_projection": False}, "EXTRA_TENSORS"),
        ({"projection_prng_key": "x"}, "BAD_FIELD"),
        ({"target_modules": ["q_proj"]}, "BASE_MISMATCH"),
        ({"target_modules": "dummy-target-modules"}, "NO_TARGETS"),
        ({"sample_at_inference": True}, "UNSUPPORTED_FEATURE"),
        ({"r": 5000}, "RANK_TOO_LARGE"),
    ],
)
def test_what_does_not_fit_is_refused(
    make: Make, changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder = tune("llama", make(r=5, target_modules=TARGETS["llama"]))
    assert refusal("llama", folder, **changes).reason == reason


def test_projections_that_were_not_saved_are_missing(tune: Make, refusal: Make) -> None:
    config = peft.VeraConfig(r=5, target_modules=["q_proj"], save_projection=False)
    assert refusal("llama", tune("llama", config), save_projection=True).reason == "MISSING_TENSORS"
