"""`deltamux inspect` as it is typed: with and without a model, served and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deltamux.cli import main
from deltamux.demo.tasks import weights_path

BASE = str(weights_path() / "base")
ADAPTER = weights_path() / "adapters" / "rot13"


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["inspect", *arguments, "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_files_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspected(capsys, str(ADAPTER))
    files = report["files"]
    assert (files["library"], files["type"], files["family"]) == ("peft", "LORA", "lora")
    assert files["fields"]["r"] == 8
    assert files["bytes"] < (ADAPTER / "adapter_model.safetensors").stat().st_size
    assert files["bytes"] == sum(tensor["bytes"] for tensor in files["tensors"])
    assert sum(files["dtypes"].values()) == len(files["tensors"])
    assert report["served"] is None and report["refusal"] is None


def test_beside_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspected(capsys, str(ADAPTER), "--model", BASE)
    served = report["served"]
    assert (served["family"], served["rank"]) == ("lora", 8)
    assert served["host_bytes"] == sum(part["bytes"] for part in served["parts"])
    assert served["host_bytes"] <= served["device_bytes"] < 2 * served["host_bytes"]
    query = [p for p in served["parts"] if p["site"] == "model.layers.0.self_attn.q_proj"]
    assert [(p["primitive"], p["rank"]) for p in query] == [("low rank", 8), ("row scale", None)]
    half = inspected(capsys, str(ADAPTER), "--model", BASE, "--dtype", "float16")["served"]
    assert half["host_bytes"] == served["host_bytes"] / 2


def test_tables_name_what_the_report_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ADAPTER)]) == 0
    text = capsys.readouterr().out
    assert "LORA of peft, family lora" in text and "q_proj.lora_A.weight" in text
    assert main(["inspect", str(ADAPTER), "--model", BASE]) == 0
    text = capsys.readouterr().out
    assert "low rank" in text and "on the device" in text


@pytest.mark.parametrize(
    ("fields", "model", "reason"),
    [
        ({"peft_type": "TELEPATHY"}, False, "UNKNOWN_TYPE"),
        ({"r": 9}, True, "RANK_MISMATCH"),
        ({"thoughts": 1}, True, "UNKNOWN_FIELD"),
    ],
)
def test_what_would_be_refused_is_said_with_the_reason(
    fields: dict[str, object],
    model: bool,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(ADAPTER, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arguments = [str(folder), *(["--model", BASE] if model else [])]
    assert inspected(capsys, *arguments)["refusal"]["reason"] == reason
    assert main(["inspect", *arguments]) == 1
    assert f"({reason})" in capsys.readouterr().out


def test_no_adapter_is_a_refusal_and_no_model_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspected(capsys, "no-such-folder")["refusal"]["reason"] == "MISSING_CONFIG"
    assert main(["inspect", str(ADAPTER), "--model", "no/such/model/anywhere", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "", "nothing is said of the adapter"
    assert captured.err.startswith("deltamux inspect: no/such/model/anywhere")
    assert captured.err.count("\n") == 1
