"""A broken or foreign checkpoint is refused by name; nothing in it is passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS
from deltamux.errors import DeltamuxError

Tensors = dict[str, Tensor]
Make = Callable[..., Any]

SITE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{SITE}.lora_A.weight", f"{SITE}.lora_B.weight"


@pytest.fixture(scope="session")
def sound(save: Make) -> Path:
    folder: Path = save("llama", r=3, target_modules=["q_proj", "v_proj"])
    return folder


def refusal(parse: Callable[[Path], object], folder: Path) -> DeltamuxError:
    with pytest.raises(DeltamuxError) as caught:
        parse(folder)
    return caught.value


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.cat([tensor[:-1], torch.full_like(tensor[-1:], value)])


@pytest.mark.parametrize(
    ("change", "code", "reason", "named"),
    [
        pytest.param(
            replaced(A, poisoned(float("nan"))), "INVALID_ARGUMENT", "NON_FINITE", A, id="BI-15 NaN"
        ),
        pytest.param(
            replaced(B, poisoned(float("-inf"))),
            "INVALID_ARGUMENT",
            "NON_FINITE",
            B,
            id="BI-15 infinity",
        ),
        pytest.param(
            without(B), "INVALID_ARGUMENT", "MISSING_TENSORS", "lora_B", id="BI-17 A without B"
        ),
        pytest.param(
            without(A, B), "INVALID_ARGUMENT", "MISSING_TENSORS", "q_proj", id="a module is missing"
        ),
        pytest.param(
            replaced(A, lambda a: a[:0]),
            "INVALID_ARGUMENT",
            "SHAPE_MISMATCH",
            "empty",
            id="BI-5 zero size",
        ),
        pytest.param(
            replaced(A, lambda a: a[:2]),
            "INVALID_ARGUMENT",
            "SHAPE_MISMATCH",
            "q_proj",
            id="BI-17 A and B do not chain",
        ),
        pytest.param(
            replaced(A, lambda a: a[:, :-1]),
            "FAILED_PRECONDITION",
            "BASE_MISMATCH",
            "q_proj",
            id="BI-18 narrower input",
        ),
        pytest.param(
            replaced(B, lambda b: torch.cat([b, b])),
            "FAILED_PRECONDITION",
            "BASE_MISMATCH",
            "q_proj",
            id="BI-18 wider output",
        ),
        pytest.param(
            renamed("layers.1.", "layers.7."),
            "FAILED_PRECONDITION",
            "BASE_MISMATCH",
            "layers.7",
            id="BI-19 a layer too far",
        ),
        pytest.param(
            renamed("model.model.", "model."),
            "FAILED_PRECONDITION",
            "BASE_MISMATCH",
            "base_model.model.layers",
            id="BI-19 trained on the inner model",
        ),
        pytest.param(
            renamed("base_model.", ""),
            "INVALID_ARGUMENT",
            "EXTRA_TENSORS",
            "model.model.layers",
            id="BI-20 no prefix",
        ),
        pytest.param(
            added(f"{SITE}.lora_E", 3, 1),
            "INVALID_ARGUMENT",
            "EXTRA_TENSORS",
            "lora_E",
            id="BI-20 an unknown part",
        ),
        pytest.param(
            added(f"{SITE.replace('q_proj', 'o_proj')}.lora_A.weight", 3, 32),
            "INVALID_ARGUMENT",
            "EXTRA_TENSORS",
            "o_proj",
            id="BI-20 a module that the config does not target",
        ),
        pytest.param(
            added(f"{SITE}.lora_B.bias", 32),
            "INVALID_ARGUMENT",
            "EXTRA_TENSORS",
            "lora_B.bias",
            id="BI-20 a bias without lora_bias",
        ),
        pytest.param(
            added(f"{SITE}.lora_magnitude_vector", 32),
            "INVALID_ARGUMENT",
            "EXTRA_TENSORS",
            "magnitude",
            id="BI-20 a magnitude without use_dora",
        ),
        pytest.param(
            added("base_model.model.model.norm.weight", 32),
            "FAILED_PRECONDITION",
            "UNSUPPORTED_FEATURE",
            "norm",
            id="BI-20 a trained norm",
        ),
        pytest.param(
            lambda tensors: {
                k: v[:, :2].clone() if "lora_B" in k else v[:2] for k, v in tensors.items()
            },
            "INVALID_ARGUMENT",
            "RANK_MISMATCH",
            "rank 2",
            id="BI-21",
        ),
        pytest.param(
            replaced(A, lambda a: a[None]),
            "INVALID_ARGUMENT",
            "SHAPE_MISMATCH",
            "3 dimensions",
            id="BI-23",
        ),
        pytest.param(
            added("base_model.model.lm_head.weight", 61, 32),
            "FAILED_PRECONDITION",
            "UNSUPPORTED_FEATURE",
            "lm_head",
            id="a trained head",
        ),
        pytest.param(
            added("base_model.model.model.embed_tokens.weight", 64, 32),
            "FAILED_PRECONDITION",
            "UNSUPPORTED_FEATURE",
            "embed_tokens",
            id="a resized vocabulary of another base",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    change: Callable[[Tensors], Tensors],
    code: str,
    reason: str,
    named: str,
    sound: Path,
    rewrite: Make,
    serve: Make,
) -> None:
    error = refusal(serve("llama").parse, rewrite(sound, change))
    assert (error.code, error.reason) == (code, reason)
    assert named in error.message


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        pytest.param({"target_modules": ["nothing"]}, "INVALID_ARGUMENT", "NO_TARGETS", id="BI-20"),
        pytest.param(
            {"rank_pattern": {"k_proj": 3}}, "INVALID_ARGUMENT", "BAD_FIELD", id="BI-40 rank"
        ),
        pytest.param(
            {"alpha_pattern": {"k_proj": 3}}, "INVALID_ARGUMENT", "BAD_FIELD", id="BI-40 alpha"
        ),
        pytest.param(
            {"peft_type": "XLORA"}, "FAILED_PRECONDITION", "UNSUPPORTED_TYPE", id="BI-36 X-LoRA"
        ),
        pytest.param(
            {"peft_type": "ADAPTION_PROMPT"},
            "FAILED_PRECONDITION",
            "UNSUPPORTED_TYPE",
            id="BI-36 gated prompt",
        ),
        pytest.param({"r": 4}, "INVALID_ARGUMENT", "RANK_MISMATCH", id="BI-21"),
        pytest.param({"use_dora": True}, "INVALID_ARGUMENT", "MISSING_TENSORS", id="no magnitude"),
        pytest.param({"lora_bias": True}, "INVALID_ARGUMENT", "MISSING_TENSORS", id="no bias"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(
    fields: dict[str, Any],
    code: str,
    reason: str,
    sound: Path,
    serve: Make,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(sound, tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    error = refusal(serve("llama").parse, folder)
    assert (error.code, error.reason) == (code, reason)


@pytest.mark.parametrize(
    ("peft_type", "why"), [("PSOFT", "signs"), ("ADAMSS", "clusters"), ("LILY", "batch")]
)
def test_a_type_that_cannot_be_served_is_refused_with_its_reason(
    peft_type: str, why: str, sound: Path, serve: Make, tmp_path: Path
) -> None:
    folder = shutil.copytree(sound, tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "peft_type": peft_type}))
    error = refusal(serve("llama").parse, folder)
    assert error.reason == "UNSUPPORTED_TYPE"
    assert why in error.message


def test_lora_bias_at_an_embedding_is_refused(save: Make, serve: Make, tmp_path: Path) -> None:
    folder = save("llama", r=3, target_modules=["embed_tokens"])
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "lora_bias": True}))
    error = refusal(serve("llama").parse, folder)
    assert error.code == "INVALID_ARGUMENT"
    assert "embed_tokens" in error.message


def test_a_sound_adapter_of_another_base_does_not_fit(sound: Path, serve: Make) -> None:
    assert refusal(serve("gpt2").parse, sound).reason == "NO_TARGETS"


def test_numbers_beyond_the_serving_dtype_are_refused(
    sound: Path, rewrite: Make, serve: Make
) -> None:
    large = rewrite(sound, replaced(B, lambda b: b * 1e6))
    served = serve("llama")
    served.parse(large)
    error = refusal(lambda folder: served.parse(folder, dtype=torch.float16), large)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "NON_FINITE")


def test_bi_44_other_files_in_the_folder_are_never_read(
    sound: Path, serve: Make, tmp_path: Path
) -> None:
    folder = shutil.copytree(sound, tmp_path / "adapter")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    (folder / "tokenizer.json").write_text("not JSON")
    assert serve("llama").parse(folder).rank == 3


def test_bi_14_a_pickle_alone_is_refused(sound: Path, serve: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "adapter")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert refusal(serve("llama").parse, folder).reason == "PICKLE_REFUSED"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_are_read(
    dtype: torch.dtype, sound: Path, rewrite: Make, serve: Make
) -> None:
    half = rewrite(sound, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    served = serve("llama")
    (exact,) = served.parse(sound).payloads["model.layers.1.self_attn.v_proj"]
    (rounded,) = served.parse(half).payloads["model.layers.1.self_attn.v_proj"]
    assert torch.equal(rounded.a.float(), exact.a.to(dtype).float())
