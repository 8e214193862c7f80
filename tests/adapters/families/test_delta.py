"""The own format against transformers with the same dense weights, beside LoRA and the base."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltamux.adapters.checkpoint.delta_format import base_sample
from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS
from deltamux.errors import DeltamuxError
from deltamux_kernels.sign_delta import pack_signs

Make = Callable[..., Any]
Tensors = dict[str, Tensor]

CONFIGURATION = {"deltamux_type": "delta", "version": 1, "base_model_name_or_path": "base"}
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(tensors, name, **fields) -> the folder of an own checkpoint."""

    def write(tensors: Tensors, name: str = "delta", **fields: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(CONFIGURATION | fields))
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
        return folder

    return write


@pytest.fixture
def answers(serve: Make, save: Make, ids: Tensor) -> Callable[..., None]:
    """answers(name, folder, model): asserts that the adapter answers as `model`, beside others."""

    def answers(name: str, folder: Path, model: PreTrainedModel) -> None:
        served = serve(name)
        served.load(1, folder)
        targets = {"gpt2": ["c_attn"]}.get(name, ["q_proj", "down_proj"])
        served.load(2, save(name, r=4, target_modules=targets))
        mixed = served.logits(ids[:4], [None, 1, 2, 1])
        plain = served.logits(ids[:4], [None] * 4)
        alone = served.logits(ids[2:3], [2])
        assert torch.equal(mixed[0], plain[0])
        torch.testing.assert_close(mixed[2], alone[0], atol=3e-5, rtol=1e-5)
        with torch.no_grad():
            expected = model(ids[[1, 3]]).logits
        assert (expected - plain[[1, 3]]).abs().amax(dim=(1, 2)).min() > 0.05
        torch.testing.assert_close(mixed[[1, 3]], expected, atol=1e-4, rtol=1e-5)

    return answers


def tuned(base: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Every parameter a little moved."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std())
    return model


def matrix(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter as the format means it: [out, in], also of a Conv1D."""
    module, _, part = name.rpartition(".")
    parameter = model.get_parameter(name).detach()
    conv1d = isinstance(model.get_submodule(module), Conv1D) and part == "weight"
    return parameter.T if conv1d else parameter


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_bias", "gemma3", "gpt2", "qwen3"])
def test_whole_parameters_answer_as_the_tuned_model(
    name: str, base: Make, write: Make, answers: Make
) -> None:
    model = tuned(base(name))
    tensors = {f"{n}.value": matrix(model, n) for n, _ in model.named_parameters()}
    samples = {f"{n}.base": base_sample(matrix(base(name), n)) for n, _ in model.named_parameters()}
    answers(name, write(tensors | samples), model)


def low_rank(weight: Tensor) -> tuple[Tensors, Tensor]:
    a, b = torch.randn(3, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], 3) * 0.2
    return {"low_rank.a": a, "low_rank.b": b}, b @ a


def sparse(weight: Tensor) -> tuple[Tensors, Tensor]:
    delta = torch.randn(weight.shape) * (torch.rand(weight.shape) < 0.05)
    delta[0, -1] = 1
    rows = delta.to_sparse_csr()
    tensors = {
        "sparse.values": rows.values(),
        "sparse.columns": rows.col_indices().int(),
        "sparse.starts": rows.crow_indices().int(),
        "sparse.shape": torch.tensor(weight.shape, dtype=torch.int32),
    }
    return tensors, delta


def one_bit(weight: Tensor) -> tuple[Tensors, Tensor]:
    positive = torch.rand(weight.shape) < 0.5
    tensors = {
        "one_bit.signs": pack_signs(positive),
        "one_bit.scale": torch.tensor([0.0371]),
        "one_bit.shape": torch.tensor(weight.shape, dtype=torch.int32),
    }
    return tensors, 0.0371 * (positive.float() * 2 - 1)


@pytest.mark.parametrize("name", ["llama", "llama_bias", "gpt2"])
@pytest.mark.parametrize(
    "forms", [[low_rank], [sparse], [one_bit], [low_rank, sparse]], ids=lambda f: f[-1].__name__
)
def test_compressed_forms_answer_as_their_dense_reconstruction(
    name: str, forms: list[Make], base: Make, write: Make, answers: Make
) -> None:
    torch.manual_seed(len(forms))
    model, tensors = copy.deepcopy(base(name)), {}
    linear = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "head" not in n
    ]
    for module in linear:
        for form in forms:
            parts, delta = form(matrix(model, f"{module}.weight"))
            tensors |= {f"{module}.weight.{part}": tensor for part, tensor in parts.items()}
            with torch.no_grad():
                matrix(model, f"{module}.weight").add_(delta)
    answers(name, write(tensors), model)


def test_biases_where_the_base_has_none(base: Make, write: Make, answers: Make) -> None:
    torch.manual_seed(0)
    model, tensors = copy.deepcopy(base("llama")), {}
    for name, module in base("llama").named_modules():
        if isinstance(module, nn.Linear):
            bias = torch.randn(module.out_features) * 0.3
            tensors[f"{name}.bias.value"] = bias
            model.get_submodule(name).bias = nn.Parameter(bias, requires_grad=False)
    answers("llama", write(tensors), model)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
def test_tokens_with_rows_of_their_own(
    name: str, base: Make, write: Make, answers: Make, ids: Tensor
) -> None:
    torch.manual_seed(0)
    model, tokens = copy.deepcopy(base(name)), ids[1:4, :4].flatten().unique()
    embedding = model.get_input_embeddings().weight
    rows = embedding[tokens] + torch.randn(len(tokens), 32) * 0.2 * embedding.std()
    embedding[tokens] = rows
    order = torch.randperm(len(tokens))
    parts = {"rows.ids": tokens[order].int(), "rows.values": rows[order]}
    answers(name, write({f"{EMBEDDING}.{part}": t for part, t in parts.items()}), model)


def test_rows_of_an_untied_head(base: Make, write: Make, answers: Make) -> None:
    model, tokens = copy.deepcopy(base("llama")), torch.tensor([60, 3, 17])
    model.lm_head.weight[tokens] *= 1.5
    tensors = {
        "lm_head.weight.rows.ids": tokens,
        "lm_head.weight.rows.values": model.lm_head.weight[tokens],
    }
    answers("llama", write(tensors), model)


def test_a_head_of_its_own_is_no_longer_tied(base: Make, write: Make, answers: Make) -> None:
    model = copy.deepcopy(base("llama_tied"))
    model.lm_head.weight = nn.Parameter(base("llama_tied").lm_head.weight * 1.1)
    answers("llama_tied", write({"lm_head.weight.value": model.lm_head.weight.detach()}), model)


def test_memory_is_that_of_what_is_stored(base: Make, write: Make, serve: Make) -> None:
    parts, _ = one_bit(matrix(base("llama"), f"{QUERY}.weight"))
    tensors = {f"{QUERY}.weight.{part}": tensor for part, tensor in parts.items()}
    served = serve("llama")
    adapter = served.load(0, write(tensors))
    assert adapter.host_bytes == 32 * 32 // 8 + 4
    assert adapter.parameters == 32 * 32 + 1
    assert served.sites.used_bytes == 2 * 64 * 4  # an aligned extent for either part


def rows(*ids: int, width: int = 32, module: str = "model.embed_tokens") -> Tensors:
    return {
        f"{module}.weight.rows.ids": torch.tensor(ids, dtype=torch.int32),
        f"{module}.weight.rows.values": torch.ones(3, width),
    }


def parts(form: Make, shape: tuple[int, int] = (32, 32)) -> Tensors:
    torch.manual_seed(0)
    return {f"{QUERY}.weight.{part}": t for part, t in form(torch.zeros(shape))[0].items()}


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(part)}


def changed(tensors: Tensors, part: str, change: Callable[[Tensor], Tensor]) -> Tensors:
    name = f"{QUERY}.weight.{part}"
    return tensors | {name: change(tensors[name])}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (without(parts(low_rank), "low_rank.b"), "MISSING_TENSORS"),
        (without(parts(low_rank), "low_rank.a"), "EXTRA_TENSORS"),
        (parts(low_rank, (32, 31)), "BASE_MISMATCH"),
        (changed(parts(low_rank), "low_rank.a", lambda a: a[1:]), "BASE_MISMATCH"),
        (without(parts(sparse), "sparse.shape"), "MISSING_TENSORS"),
        (parts(sparse, (32, 31)), "BASE_MISMATCH"),
        (changed(parts(sparse), "sparse.columns", lambda c: c + 1), "MALFORMED_WEIGHTS"),
        (changed(parts(sparse), "sparse.columns", lambda c: -c), "MALFORMED_WEIGHTS"),
        (changed(parts(sparse), "sparse.columns", lambda c: c[1:]), "MALFORMED_WEIGHTS"),
        (changed(parts(sparse), "sparse.starts", lambda s: s.flip(0)), "MALFORMED_WEIGHTS"),
        (changed(parts(sparse), "sparse.starts", lambda s: s[1:]), "MALFORMED_WEIGHTS"),
        (
            changed(parts(sparse), "sparse.starts", lambda s: s[[*range(33), -1]]),
            "MALFORMED_WEIGHTS",
        ),
        (changed(parts(sparse), "sparse.values", lambda v: v.int()), "MALFORMED_WEIGHTS"),
        (parts(one_bit, (32, 31)), "BASE_MISMATCH"),
        (changed(parts(one_bit), "one_bit.signs", lambda s: s.long()), "MALFORMED_WEIGHTS"),
        (changed(parts(one_bit), "one_bit.signs", lambda s: s[1:]), "MALFORMED_WEIGHTS"),
        (changed(parts(one_bit), "one_bit.scale", lambda s: s.repeat(2)), "MALFORMED_WEIGHTS"),
        (parts(sparse) | {f"{QUERY}.weight.value": torch.zeros(32, 32)}, "EXTRA_TENSORS"),
        ({f"{QUERY}.weight.value": torch.zeros(32, 31)}, "BASE_MISMATCH"),
        ({f"{QUERY}.weight.value": torch.zeros(32)}, "SHAPE_MISMATCH"),
        (without(rows(1, 2, 3), "ids"), "MISSING_TENSORS"),
        (without(rows(1, 2, 3), "values"), "EXTRA_TENSORS"),
        (rows(1, 2, 2), "MALFORMED_WEIGHTS"),
        (rows(1, -2, 3), "MALFORMED_WEIGHTS"),
        (rows(1, 2), "BASE_MISMATCH"),
        (rows(1, 2, 61), "ADDED_TOKENS"),
        (rows(1, 2, 3, width=31), "BASE_MISMATCH"),
        (rows(1, 2, 3, module=QUERY), "EXTRA_TENSORS"),
        (rows(1, 2, 3) | {f"{EMBEDDING}.value": torch.zeros(61, 32)}, "EXTRA_TENSORS"),
        ({f"{QUERY}.weight": torch.zeros(32, 32)}, "EXTRA_TENSORS"),
        ({f"{QUERY}.bias.value": torch.zeros(31)}, "BASE_MISMATCH"),
        ({"model.norm.weight.value": torch.zeros(31)}, "BASE_MISMATCH"),
        ({f"{EMBEDDING}.low_rank.a": torch.zeros(2, 32)}, "EXTRA_TENSORS"),
        ({"model.layers.9.mlp.up_proj.weight.value": torch.zeros(48, 32)}, "BASE_MISMATCH"),
        (parts(one_bit) | {f"{QUERY}.weight.base": torch.zeros(64)}, "BASE_MISMATCH"),
        (parts(one_bit) | {f"{QUERY}.bias.base": torch.zeros(32)}, "BASE_MISMATCH"),
    ],
)
def test_wrong_tensors_are_refused(tensors: Tensors, reason: str, write: Make, serve: Make) -> None:
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(write(tensors))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"version": 2}, "BAD_FIELD"), ({"version": None}, "BAD_FIELD"), ({"r": 4}, "UNKNOWN_FIELD")],
)
def test_wrong_configs_are_refused(
    fields: dict[str, object], reason: str, write: Make, serve: Make
) -> None:
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(write(parts(one_bit), **fields))
    assert caught.value.reason == reason
