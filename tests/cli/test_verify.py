"""`deltamux verify` as it is typed: agreement, disagreement, a library that is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltamux.adapters.primitives import low_rank
from deltamux.cli import main
from deltamux.demo.tasks import weights_path
from deltamux_kernels.sign_delta import pack_signs

PEERS = Path(__file__).parents[1] / "peers" / "adapterhub"
BASE = str(weights_path() / "base")
ADAPTER = str(weights_path() / "adapters" / "rot13")
COMMAND = ["verify", ADAPTER, "--model", BASE, "--device", "cpu"]


def test_an_adapter_of_peft_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["library"].startswith("PEFT ") and report["agrees"]
    assert report["largest"] < 1e-4 < report["effect"] / 1000
    assert report["base_largest"] < 1e-4
    assert report["same_choice"] == 1


def test_an_own_adapter_is_held_to_its_dense_reconstruction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    weight = "model.layers.0.self_attn.q_proj.weight"
    (tmp_path / "adapter_config.json").write_text('{"deltamux_type": "delta", "version": 1}')
    tensors = {
        f"{weight}.one_bit.signs": pack_signs(torch.rand(128, 128) < 0.5),
        f"{weight}.one_bit.scale": torch.tensor([0.02]),
        f"{weight}.one_bit.shape": torch.tensor([128, 128], dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "prompts").write_text("good morning\n")
    prompts = ["--prompts", str(tmp_path / "prompts")]
    assert main(["verify", str(tmp_path), "--model", BASE, "--device", "cpu", *prompts]) == 0
    text = capsys.readouterr().out
    assert "of 1 prompts, with dense reconstruction" in text and "equal within 1e-04" in text


def test_a_task_head_is_compared_by_its_logits(capsys: pytest.CaptureFixture[str]) -> None:
    head = str(weights_path() / "adapters" / "word-count")
    assert main(["verify", head, "--model", BASE, "--device", "cpu"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["adapter"].startswith("logits differ by") and "moves" not in lines["adapter"]
    assert "embeddings differ by" in lines["base"] and "greedy" not in lines


def test_a_difference_above_the_tolerance_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expand = low_rank.expand

    def wrong(y: torch.Tensor, *rest: object) -> None:
        expand(y, *rest)
        y += 1e-2

    monkeypatch.setattr(low_rank, "expand", wrong)
    assert main(COMMAND) == 1
    text = capsys.readouterr().out
    assert "not equal within 1e-04" in text


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(COMMAND) == 1
    error = capsys.readouterr().err
    assert error.startswith("deltamux verify: PEFT is not installed")
    assert "deltamux[verify]" in error and len(error.splitlines()) == 1


def test_a_library_that_cannot_be_here_is_told_how_to_be_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["verify", str(PEERS / "llama" / "houlsby"), "--model", str(PEERS / "llama")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("deltamux verify: AdapterHub is not installed")
    assert "python -m venv adapterhub; adapterhub/bin/pip install torch adapters==1.3.0" in error
    assert "--reference-python adapterhub/bin/python" in error and len(error.splitlines()) == 1


def test_a_python_that_breaks_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAMUX_REFERENCE_PYTHON", "/bin/false")
    assert main(COMMAND) == 1
    error = capsys.readouterr().err
    assert error == "deltamux verify: /bin/false gave no answer: it ended with exit code 1\n"
