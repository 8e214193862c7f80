"""`deltamux extract` as it is typed: report, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltamux.cli import main
from deltamux.demo.tasks import weights_path

BASE = weights_path() / "base"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model with its query projections moved by one direction each, and its norm."""
    folder = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                rows, columns = parameter.shape
                parameter.add_(torch.outer(torch.randn(rows), torch.randn(columns)) * 0.05)
            if name == "model.norm.weight":
                parameter.mul_(1.1)
    model.save_pretrained(folder)
    return folder


def command(tuned: Path, out: Path, *more: str) -> list[str]:
    return ["extract", "--base", str(BASE), "--tuned", str(tuned), "--out", str(out), *more]


def test_the_report_as_json(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tuned, tmp_path, "--form", "low-rank", "--rank", "1", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    layers = AutoModelForCausalLM.from_pretrained(BASE).config.num_hidden_layers
    assert [stored["form"] for stored in report["stored"]] == ["low-rank"] * layers + ["exact"]
    assert max(stored["relative_error"] for stored in report["stored"]) < 1e-2
    assert report["bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert sum(report["bytes_by_form"].values()) < report["bytes"] < report["full_bytes"] / 5
    assert report["logits"]["base_largest"] > 50 * report["logits"]["largest"]
    assert report["logits"]["same_choice"] == 1


def test_the_report_as_a_table(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").write_text("good morning\n\nblue hat\n")
    prompts = ("--prompts", str(tmp_path / "prompts"))
    assert main(command(tuned, tmp_path / "out", "--form", "one-bit", *prompts)) == 0
    text = capsys.readouterr().out
    assert "model.norm.weight" in text and "one-bit" in text
    assert "tokens of 2 prompts" in text
    assert main(command(tuned, tmp_path / "out")) == 2
    assert "has an adapter already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tuned", "no/such/model/anywhere"], "is neither a folder nor a model"),
        (["--tuned", str(BASE)], "has the same weights as"),
        (["--prompts", "no-such-file"], "no-such-file: No such file or directory"),
        (["--out", "/dev/null/x"], "/dev/null/x: Not a directory"),
    ],
)
def test_errors_are_one_line(
    more: list[str],
    message: str,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(tuned, tmp_path, *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("deltamux extract: ") and message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rank", "4"], "--rank is of --form low-rank, not of exact"),
        (["--form", "one-bit", "--share", "0.1"], "--share is of --form sparse, not of one-bit"),
    ],
)
def test_an_option_of_another_form_is_wrong_usage(
    more: list[str],
    message: str,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(tuned, tmp_path / "out", *more)) == 2
    assert capsys.readouterr().err == f"deltamux extract: {message}\n"
    assert not (tmp_path / "out").exists()
