"""LoRA inside the experts of a mixture against PEFT, beside LoRA elsewhere and the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]

BOTH = ["mlp.experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def experts(save: Make) -> Make:
    """experts(name, **LoraConfig): an adapter of nothing but experts."""
    return lambda name, **config: save(
        name, **{"target_modules": [], "target_parameters": BOTH, **config}
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_each_layer_of_the_experts(name: str, experts: Make, save: Make, as_in_peft: Make) -> None:
    as_in_peft(
        name,
        [
            experts(name, seed=1, r=3, lora_alpha=5),
            experts(name, seed=2, r=4, target_modules=["q_proj"], target_parameters=BOTH[:1]),
            save(name, seed=3, r=8, target_modules=["q_proj", "o_proj"]),
            experts(name, seed=4, r=5, target_parameters=BOTH[1:], use_rslora=True),
        ],
    )


def test_some_layers_and_ranks_of_their_own(experts: Make, as_in_peft: Make) -> None:
    some = ["1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    tables = {"rank_pattern": {"gate_up_proj": 7}, "alpha_pattern": {"experts.down_proj": 3}}
    as_in_peft("mixtral", [experts("mixtral", r=4, target_parameters=some, **tables)])


def test_whole_modules_beside_experts(tune: Make, as_in_peft: Make) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=[], target_parameters=BOTH, modules_to_save=["norm", "lm_head"]
    )
    as_in_peft("mixtral", [tune("mixtral", config)])


def test_a_slot_is_empty_again_for_the_next_adapter(
    experts: Make, save: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    """Beside another adapter that wakes the same experts."""
    served = serve("mixtral")
    first, second = (experts("mixtral", seed=seed, r=4) for seed in (1, 2))
    plain = save("mixtral", seed=3, r=8, target_modules=["v_proj"])
    served.load(0, first)
    served.load(1, second)
    served.sites.release(0)
    served.load(0, plain)
    mixed = served.logits(ids[:2], [0, 1])
    for row, folder in enumerate((plain, second)):
        expected = reference("mixtral", folder, ids[row : row + 1])[0]
        torch.testing.assert_close(mixed[row], expected, atol=3e-5, rtol=1e-5)


def test_what_is_known_of_it(experts: Make, serve: Make) -> None:
    adapter = serve("mixtral").parse(experts("mixtral", r=4))
    assert adapter.rank == 4
    assert adapter.parameters == 2 * 4 * 4 * (32 + 96 + 48 + 32)
    assert adapter.host_bytes == 4 * adapter.parameters


KEY = "base_model.model.model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    ("fields", "tensors", "reason"),
    [
        ({"target_parameters": ["mlp.gate.weight"]}, {}, "UNSUPPORTED_FEATURE"),
        ({"target_parameters": ["q_proj.weight"]}, {}, "UNSUPPORTED_FEATURE"),
        ({"target_parameters": [*BOTH, "proj"]}, {}, "UNSUPPORTED_FEATURE"),
        ({"use_dora": True}, {}, "UNSUPPORTED_FEATURE"),
        ({"lora_bias": True}, {}, "UNSUPPORTED_FEATURE"),
        ({"alora_invocation_tokens": [1]}, {}, "UNSUPPORTED_FEATURE"),
        ({"init_lora_weights": "olora"}, {}, "UNSUPPORTED_FEATURE"),
        ({"target_parameters": None}, {}, "NO_TARGETS"),
        ({"rank_pattern": {"q_proj": 3}}, {}, "BAD_FIELD"),
        ({"r": 4}, {}, "BASE_MISMATCH"),
        ({}, {"lora_A.weight": torch.zeros(12, 47)}, "BASE_MISMATCH"),
        ({}, {"lora_B.weight": torch.zeros(12, 32)}, "BASE_MISMATCH"),
        ({}, {"lora_A.weight": None}, "MISSING_TENSORS"),
        ({}, {"lora_A.weight": torch.zeros(12, 48, dtype=torch.int32)}, "MALFORMED_WEIGHTS"),
        ({}, {"base_layer.base_layer.lora_A.weight": torch.zeros(12, 32)}, "BASE_MISMATCH"),
        ({}, {"lora_A.weight": torch.full((12, 48), torch.inf)}, "NON_FINITE"),
    ],
)
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any],
    tensors: dict[str, Tensor | None],
    reason: str,
    experts: Make,
    serve: Make,
    rewrite: Make,
) -> None:
    def changed(before: dict[str, Tensor]) -> dict[str, Tensor]:
        after = before | {KEY + part: tensor for part, tensor in tensors.items()}
        return {name: tensor for name, tensor in after.items() if tensor is not None}

    folder = rewrite(experts("mixtral", r=3), changed)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    with pytest.raises(DeltamuxError) as caught:
        serve("mixtral").parse(folder)
    assert caught.value.reason == reason


def test_a_dense_layer_beside_experts(save: Make, as_in_peft: Make) -> None:
    """PEFT saves experts where a name is theirs too, and leaves the dense layer as it is."""
    both = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    as_in_peft("qwen3_moe_dense", [save("qwen3_moe_dense", r=4, target_modules=both)])


def test_a_name_that_peft_takes_for_an_experts_is_refused(
    save: Make, serve: Make, base: Make, reference: Make, ids: Tensor
) -> None:
    """An adapter of the dense layer, as PEFT saved it on transformers 4, is the base to PEFT."""
    folder = save("qwen3_moe_dense", r=4, target_modules=["q_proj"], layers_to_transform=[0])
    config = json.loads((folder / CONFIG).read_text())
    config |= {"target_modules": ["down_proj"], "layers_to_transform": None}
    (folder / CONFIG).write_text(json.dumps(config))
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    save_file(
        {key.format("A"): torch.randn(4, 48), key.format("B"): torch.randn(32, 4)},
        folder / WEIGHTS,
    )
    plain = base("qwen3_moe_dense")(ids).logits
    torch.testing.assert_close(reference("qwen3_moe_dense", folder, ids), plain)
    with pytest.raises(DeltamuxError, match=r"layers\.0\.mlp\.down_proj.*takes the name") as caught:
        serve("qwen3_moe_dense").parse(folder)
    assert caught.value.reason == "UNSUPPORTED_FEATURE"


def test_a_base_without_experts_refuses_them(experts: Make, serve: Make) -> None:
    folder = experts("mixtral", r=3)
    with pytest.raises(DeltamuxError, match=r"experts\.") as caught:
        serve("llama").parse(folder)
    assert caught.value.reason == "UNSUPPORTED_FEATURE"
