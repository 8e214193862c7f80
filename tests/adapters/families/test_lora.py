"""LoRA against PEFT: each adapter in a mixed batch answers as PEFT does with it alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.row_scale import RowScale
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, Any] = {
    "llama": ATTENTION + MLP,
    "llama_bias": ATTENTION + MLP,
    "qwen3": ["q_proj", "v_proj", "up_proj"],
    "gemma2": "all-linear",
    "gemma3": "all-linear",
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense"],
    "mixtral": ATTENTION,
}


def assert_each_as_in_peft(
    name: str, folders: list[Path], serve: Make, reference: Make, ids: Tensor
) -> None:
    """One batch: a row without adapter, then one sequence for each adapter."""
    served = serve(name)
    plain = served.logits(ids, [None] * len(ids))
    for slot, folder in enumerate(folders):
        served.load(slot, folder)
    slots = [None, *range(len(folders))]
    mixed = served.logits(ids[: len(slots)], slots)
    unmixed = served.logits(ids[: len(slots)], [None] * len(slots))
    assert torch.equal(mixed[0], unmixed[0])
    for row, folder in enumerate(folders, start=1):
        expected = reference(name, folder, ids[row : row + 1])[0]
        assert (expected - plain[row]).abs().max() > 0.1
        torch.testing.assert_close(mixed[row], expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_mixed_ranks_and_variants_in_one_batch(
    name: str, save: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    targets = TARGETS[name]
    bias = {"lora_bias": True} if name != "gpt2" else {}
    folders = [
        save(name, seed=1, r=3, lora_alpha=5, target_modules=targets, **bias),
        save(name, seed=2, r=8, lora_alpha=8, target_modules=targets, use_rslora=True),
        save(name, seed=3, r=5, lora_alpha=9, target_modules=targets, use_dora=True),
        save(name, seed=4, r=16, lora_alpha=16, target_modules=targets),
    ]
    assert_each_as_in_peft(name, folders, serve, reference, ids)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["v_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "mlp.up_proj"]},
        {"target_modules": ATTENTION, "exclude_modules": r".*\.0\..*"},
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(k|down)_proj"},
        {"target_modules": ["model.layers.1.mlp.gate_proj"]},
        {
            "target_modules": ATTENTION,
            "rank_pattern": {r"layers\.0\..*q_proj": 7, "v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "o_proj": 11},
        },
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 9},
            "alpha_pattern": {"k_proj": 2},
        },
        {"target_modules": ATTENTION, "init_lora_weights": "orthogonal", "r": 4},
    ],
)
def test_every_way_to_name_modules_ranks_and_alphas(
    config: dict[str, Any], save: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    folder = save("llama", **{"r": 4, "lora_alpha": 6, **config})
    assert_each_as_in_peft("llama", [folder], serve, reference, ids)


def restored(folder: Path, **fields: Any) -> Path:
    """Puts back what PEFT resolves before it saves: the config as a person wrote it."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    return folder


def test_all_linear_as_a_word_in_the_file(
    save: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    folder = save("gpt2", r=4, lora_alpha=6, target_modules="all-linear")
    restored(folder, target_modules="all-linear")
    assert_each_as_in_peft("gpt2", [folder], serve, reference, ids)


@pytest.mark.parametrize("flag", [True, False])
def test_fan_in_fan_out_follows_the_base_whatever_the_config_says(
    flag: bool, save: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    folder = save("gpt2", r=4, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    expected = reference("gpt2", folder, ids[:1])
    served = serve("gpt2")
    served.load(0, restored(folder, fan_in_fan_out=flag))
    torch.testing.assert_close(served.logits(ids[:1], [0]), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_embeddings_and_language_heads_tied_or_not(
    name: str,
    dora: bool,
    targets: list[str],
    save: Make,
    serve: Make,
    reference: Make,
    ids: Tensor,
) -> None:
    folders = [
        save(name, seed=1, r=3, target_modules=targets, use_dora=dora),
        save(name, seed=2, r=6, target_modules=[*targets, "q_proj", "v_proj"], use_dora=dora),
    ]
    assert_each_as_in_peft(name, folders, serve, reference, ids)


def test_position_embeddings_are_sites_too(
    save: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    folder = save("gpt2", r=3, target_modules=["wte", "wpe"])
    assert_each_as_in_peft("gpt2", [folder], serve, reference, ids)


def test_saved_copies_of_the_base_are_compared_and_left_out(save: Make, serve: Make) -> None:
    folder = save("llama", r=3, target_modules=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert name in load_file(folder / WEIGHTS)
    adapter = serve("llama").parse(folder)
    assert name in adapter.note
    assert adapter.parameters == 3 * (61 + 32)


def test_a_copy_in_a_coarser_dtype_is_still_a_copy(save: Make, serve: Make, rewrite: Make) -> None:
    folder = save("llama", r=3, target_modules=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    coarse = rewrite(folder, lambda t: {**t, name: t[name].bfloat16()})
    assert name in serve("llama").parse(coarse).note


def test_what_is_known_of_an_adapter(save: Make, serve: Make) -> None:
    folder = save("llama", r=3, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5})
    adapter = serve("llama").parse(folder)
    assert (adapter.family, adapter.rank, adapter.note) == ("lora", 5, "")
    assert adapter.parameters == 2 * (3 * (32 + 32) + 5 * (32 + 16))
    assert adapter.host_bytes == 4 * adapter.parameters


def test_the_scale_is_folded_in_float32_and_rounded_once(save: Make, serve: Make) -> None:
    folder = save("llama", r=3, lora_alpha=7, target_modules=["q_proj"])
    tensors = load_file(folder / WEIGHTS)
    served = serve("llama")
    adapter = served.parse(folder, dtype=torch.bfloat16)
    (payload,) = adapter.payloads["model.layers.0.self_attn.q_proj"]
    assert isinstance(payload, LowRank)
    b = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(payload.b, (b * (7 / 3)).T.bfloat16())


def test_doras_scale_is_the_magnitude_over_the_norm_of_each_row(save: Make, serve: Make) -> None:
    folder = save("llama_bias", r=3, lora_alpha=7, target_modules=["q_proj"], use_dora=True)
    tensors = {k: v.double() for k, v in load_file(folder / WEIGHTS).items()}
    served = serve("llama_bias")
    site = "model.layers.0.self_attn.q_proj"
    _, payload = served.parse(folder).payloads[site]
    assert isinstance(payload, RowScale)
    key = f"base_model.model.{site}."
    delta = tensors[key + "lora_B.weight"] @ tensors[key + "lora_A.weight"] * 7 / 3
    norms = (served.structure.weight(site).double() + delta).norm(dim=1)
    expected = (tensors[key + "lora_magnitude_vector"] / norms).float()
    torch.testing.assert_close(payload.scale, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
)
def test_what_acts_on_a_whole_prompt_cannot_wait_for_an_invocation(
    config: dict[str, Any], save: Make, serve: Make
) -> None:
    folder = restored(save("llama", r=2, **config), alora_invocation_tokens=[3])
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(folder)
    assert caught.value.reason == "UNSUPPORTED_FEATURE"
