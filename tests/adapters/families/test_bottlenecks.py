"""Bottleneck adapters against the logits that AdapterHub gave, kept in tests/peers/adapterhub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltamux.adapters.checkpoint.convert import convert
from deltamux.adapters.checkpoint.files import ADAPTERHUB_WEIGHTS
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]

GOLDENS = Path(__file__).parents[2] / "peers" / "adapterhub"
LLAMA = GOLDENS / "llama"


def assert_close(logits: Tensor, expected: Tensor, name: str = "") -> None:
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-5, msg=name or None)


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("llama", ["houlsby", "pfeiffer", "parallel", "scaled_parallel", "adapter_plus"]),
        ("llama", ["compacter", "compacter_plus", "own_phm_rules", "shared_phm_weights"]),
        ("llama", ["some_layers", "normed_after", "houlsby", "compacter"]),
        ("mistral", ["houlsby", "pfeiffer", "parallel"]),
        ("gpt2", ["houlsby", "pfeiffer", "parallel"]),
        ("bert", ["houlsby", "pfeiffer", "parallel", "compacter"]),
        ("roberta", ["houlsby", "pfeiffer"]),
    ],
)
def test_each_answers_as_in_adapterhub(
    name: str, adapters: list[str], serve: Make, golden: Make
) -> None:
    """In one batch, with a row without adapter first."""
    served, expected = serve(f"adapterhub/{name}"), golden(name)
    for slot, adapter in enumerate(adapters):
        served.load(slot, GOLDENS / name / adapter)
    rows = expected["ids"].expand(len(adapters) + 1, -1)
    mixed = served.logits(rows, [None, *range(len(adapters))])
    for row, adapter in zip(mixed, ["base", *adapters], strict=True):
        assert_close(row, expected[adapter][0], adapter)


def test_lora_stands_beside_them(serve: Make, save: Make, reference: Make, golden: Make) -> None:
    name, expected = "adapterhub/llama", golden("llama")
    lora = save(name, target_modules=["o_proj", "down_proj", "q_proj"])
    served = serve(name)
    for slot, folder in enumerate([LLAMA / "pfeiffer", lora, LLAMA / "parallel"]):
        served.load(slot, folder)
    mixed = served.logits(expected["ids"].expand(4, -1), [0, 1, None, 2])
    assert_close(mixed[0], expected["pfeiffer"][0])
    assert_close(mixed[1], reference(name, lora, expected["ids"])[0])
    assert_close(mixed[2], expected["base"][0])
    assert_close(mixed[3], expected["parallel"][0])


def test_pickles_and_a_head_beside_answer_once_converted(
    serve: Make, tmp_path: Path, golden: Make
) -> None:
    served, expected = serve("adapterhub/llama"), golden("llama")
    for slot, adapter in enumerate(["normed", "with_head"]):
        with pytest.raises(DeltamuxError, match="deltamux convert"):
            served.parse(LLAMA / adapter)
        served.load(slot, convert(LLAMA / adapter, tmp_path / adapter))
    mixed = served.logits(expected["ids"].expand(3, -1), [0, None, 1])
    for row, adapter in zip(mixed, ["normed", "base", "with_head"], strict=True):
        assert_close(row, expected[adapter][0], adapter)


def test_a_copy_of_the_base_s_head_is_left_out(serve: Make, changed: Make, golden: Make) -> None:
    served, expected = serve("adapterhub/llama"), golden("llama")
    head = {"lm_head.weight": served.base.lm_head.weight}
    adapter = served.load(0, changed("pfeiffer", more=head))
    assert adapter.note == "copy of the base left out: lm_head.weight"
    assert_close(served.logits(expected["ids"], [0])[0], expected["pfeiffer"][0])


def test_a_trained_head_that_is_tied_to_the_embeddings_is_refused(
    serve: Make, changed: Make, reason: Make
) -> None:
    served = serve("adapterhub/gpt2")
    head = {"lm_head.weight": served.base.lm_head.weight + 1}
    assert reason(served, changed("pfeiffer", base="gpt2", more=head)) == "UNSUPPORTED_FEATURE"


def test_a_base_without_such_a_head_is_another(serve: Make, changed: Make, reason: Make) -> None:
    folder = changed("pfeiffer", base="bert", more={"lm_head.weight": torch.ones(61, 32)})
    assert reason(serve("adapterhub/bert"), folder) == "BASE_MISMATCH"


def test_a_norm_with_two_names_must_be_one(serve: Make, tmp_path: Path, reason: Make) -> None:
    folder = convert(LLAMA / "normed", tmp_path / "normed")
    tensors = load_file(folder / ADAPTERHUB_WEIGHTS)
    name = next(name for name in tensors if name.endswith("adapter_norm_before.bias"))
    save_file({**tensors, name: tensors[name] + 1}, folder / ADAPTERHUB_WEIGHTS)
    assert reason(serve("adapterhub/llama"), folder) == "MALFORMED_WEIGHTS"


def test_a_bare_model_leaves_its_own_name_out(changed: Make, serve: Make, golden: Make) -> None:
    folder = changed("pfeiffer", tensors=lambda name: name.removeprefix("model."))
    served, expected = serve("adapterhub/llama"), golden("llama")
    served.load(0, folder)
    assert_close(served.logits(expected["ids"], [0])[0], expected["pfeiffer"][0])


def test_a_slot_taken_over_keeps_nothing(serve: Make, golden: Make) -> None:
    served, expected = serve("adapterhub/llama"), golden("llama")
    for adapter in ("normed_after", "houlsby"):
        served.load(0, LLAMA / adapter)
        assert_close(served.logits(expected["ids"], [0])[0], expected[adapter][0])
        served.sites.release(0)
    assert_close(served.logits(expected["ids"], [0])[0], expected["base"][0])


@pytest.mark.parametrize("name", ["gelu", "gelu_orig"])
def test_without_a_version_names_are_the_old_ones(name: str, changed: Make, serve: Make) -> None:
    outer = {"version": None}
    old = serve("adapterhub/llama").parse(changed("pfeiffer", outer, non_linearity=name))
    activations = {payload.activation for (payload,) in old.payloads.values()}
    assert activations == {{"gelu": "gelu_tanh", "gelu_orig": "gelu"}[name]}


REFUSED_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"use_gating": True}, "UNSUPPORTED_FEATURE"),
    ({"inv_adapter": "nice"}, "UNSUPPORTED_FEATURE"),
    ({"cross_adapter": True}, "UNSUPPORTED_FEATURE"),
    ({"non_linearity": "mish"}, "UNSUPPORTED_FEATURE"),
    ({"non_linearity": None}, "BAD_FIELD"),
    ({"original_ln_after": False}, "UNSUPPORTED_FEATURE"),
    ({"residual_before_ln": False}, "UNSUPPORTED_FEATURE"),
    ({"residual_before_ln": "post_add"}, "UNSUPPORTED_FEATURE"),
    ({"residual_before_ln": "pre_add"}, "BAD_FIELD"),
    ({"ln_after": True, "adapter_residual_before_ln": True}, "UNSUPPORTED_FEATURE"),
    ({"scaling": 2}, "BAD_FIELD"),
    ({"scaling": "guessed"}, "BAD_FIELD"),
    ({"scaling": "learned"}, "MISSING_TENSORS"),
    ({"ln_before": True}, "MISSING_TENSORS"),
    ({"mh_adapter": True}, "MISSING_TENSORS"),
    ({"output_adapter": False}, "NO_TARGETS"),
    ({"leave_out": [1]}, "EXTRA_TENSORS"),
    ({"leave_out": 1}, "BAD_FIELD"),
    ({"reduction_factor": 8}, "BASE_MISMATCH"),
    ({"reduction_factor": {"0": 4}}, "BAD_FIELD"),
    ({"reduction_factor": 0}, "BAD_FIELD"),
    ({"phm_layer": True}, "MISSING_TENSORS"),
    ({"phm_dim": 0}, "BAD_FIELD"),
    ({"mystery": 1}, "UNKNOWN_FIELD"),
]


@pytest.mark.parametrize(("fields", "expected"), REFUSED_FIELDS, ids=lambda value: str(value))
def test_what_the_config_asks_for_is_served_or_refused(
    fields: dict[str, Any], expected: str, changed: Make, serve: Make, reason: Make
) -> None:
    assert reason(serve("adapterhub/llama"), changed("pfeiffer", **fields)) == expected


@pytest.mark.parametrize(
    ("outer", "expected"),
    [
        ({"model_type": "mistral"}, "BASE_MISMATCH"),
        ({"hidden_size": 64}, "BASE_MISMATCH"),
        ({"name": "other"}, "MISSING_TENSORS"),
        ({"model_class": "LlamaForSequenceClassification"}, "UNSUPPORTED_FEATURE"),
        ({"mystery": 1}, "UNKNOWN_FIELD"),
    ],
    ids=str,
)
def test_an_adapter_of_another_model_is_refused(
    outer: dict[str, Any], expected: str, changed: Make, serve: Make, reason: Make
) -> None:
    assert reason(serve("adapterhub/llama"), changed("pfeiffer", outer)) == expected


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        (lambda name: name.replace("layers.1", "layers.2"), "MISSING_TENSORS"),
        (lambda name: name.replace("adapter_down.0.bias", "gate.bias"), "MISSING_TENSORS"),
        (lambda name: name.replace("model.layers.0", "layers.0"), "EXTRA_TENSORS"),
    ],
)
def test_every_tensor_has_its_place(
    rename: Callable[[str], str], expected: str | None, changed: Make, serve: Make, reason: Make
) -> None:
    folder = changed("pfeiffer", tensors=rename)
    assert reason(serve("adapterhub/llama"), folder) == expected


@pytest.mark.parametrize("fields", [{"original_ln_after": False, "residual_before_ln": False}])
def test_layers_that_norm_last_need_their_residual(
    fields: dict[str, Any], changed: Make, serve: Make, reason: Make
) -> None:
    folder = changed("pfeiffer", base="bert", **fields)
    assert reason(serve("adapterhub/bert"), folder) == "UNSUPPORTED_FEATURE"


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox"])
def test_bases_that_adapterhub_has_no_names_for_are_refused(
    name: str, changed: Make, serve: Make, reason: Make
) -> None:
    folder = changed("pfeiffer", {"model_type": name})
    assert reason(serve(name), folder) == "UNSUPPORTED_FEATURE"


def test_a_layer_whose_sublayers_are_not_known_is_refused(serve: Make, reason: Make) -> None:
    served = serve("adapterhub/llama")
    del served.structure.sublayers["model.layers.1.mlp.down_proj"]
    assert reason(served, LLAMA / "pfeiffer") == "UNSUPPORTED_FEATURE"


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("layers.0.output_adapters.adapters.pfeiffer.adapter_up.bias", torch.ones(32), "EXTRA"),
        ("model.layers.0.mystery", torch.ones(3), "EXTRA"),
        ("model.layers.0.mystery", torch.ones(3, dtype=torch.int32), "MALFORMED"),
    ],
)
def test_tensors_that_nothing_asks_for_are_refused(
    name: str, tensor: Tensor, expected: str, changed: Make, serve: Make, reason: Make
) -> None:
    folder = changed("pfeiffer", more={name: tensor})
    assert reason(serve("adapterhub/llama"), folder).startswith(expected)
