"""Pickles of weights become safetensors; nothing in them is run, and nothing beside is lost."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltamux.adapters.checkpoint.convert import convert
from deltamux.adapters.checkpoint.files import ADAPTERHUB_WEIGHTS, CONFIG, WEIGHTS
from deltamux.cli import main
from deltamux.errors import DeltamuxError

ADAPTERHUB = {"config": {"mh_adapter": True}, "model_type": "llama"}
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


def write(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    for name, content in files.items():
        torch.save(content, folder / f"{name}.bin")
    return folder


@pytest.mark.parametrize(
    ("config", "pickled", "weights"),
    [
        ({"peft_type": "LORA", "r": 1}, "adapter_model", WEIGHTS),
        (ADAPTERHUB, "pytorch_adapter", ADAPTERHUB_WEIGHTS),
    ],
)
def test_a_pickle_becomes_safetensors_under_its_library_s_name(
    tmp_path: Path, config: dict[str, Any], pickled: str, weights: str
) -> None:
    source = write(tmp_path / "source", config, **{pickled: TENSORS})
    target = convert(source, tmp_path / "target")
    assert {path.name for path in target.iterdir()} == {CONFIG, weights}
    assert (target / CONFIG).read_bytes() == (source / CONFIG).read_bytes()
    written = load_file(target / weights)
    assert written.keys() == TENSORS.keys()
    assert all(torch.equal(written[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    shared = {"whole": whole, "part": whole[2:], "turned": whole.view(2, 3).T}
    source = write(tmp_path / "source", ADAPTERHUB, pytorch_adapter=shared)
    written = load_file(convert(source, tmp_path / "target") / ADAPTERHUB_WEIGHTS)
    assert all(torch.equal(written[name], shared[name]) for name in shared)


class Harmful:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    source = write(
        tmp_path / "source", ADAPTERHUB, pytorch_adapter={"a": Harmful(tmp_path / "harmed")}
    )
    assert refusal(source, tmp_path / "target") == "PICKLE_REFUSED"
    assert not (tmp_path / "harmed").exists()
    pickle.loads(pickle.dumps(Harmful(tmp_path / "harmed")))
    assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(2)}, torch.ones(2)])
def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    source = write(tmp_path / "source", ADAPTERHUB, pytorch_adapter=content)
    assert refusal(source, tmp_path / "target") == "PICKLE_REFUSED"


def test_a_broken_pickle_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source", ADAPTERHUB, pytorch_adapter=TENSORS)
    pickled = source / "pytorch_adapter.bin"
    pickled.write_bytes(pickled.read_bytes()[:100])
    assert refusal(source, tmp_path / "target") == "PICKLE_REFUSED"


@pytest.mark.parametrize(
    ("config", "head", "reason"),
    [
        ({"config": None}, {"lm_head.weight": torch.ones(2, 2)}, None),
        ({"config": None}, {"score.weight": torch.ones(2, 2)}, "UNSUPPORTED_FEATURE"),
        ({"config": {"layers": 2}}, {"lm_head.weight": torch.ones(2, 2)}, "UNSUPPORTED_FEATURE"),
    ],
)
def test_a_language_head_goes_into_the_same_file_and_no_other(
    tmp_path: Path, config: dict[str, Any], head: dict[str, Tensor], reason: str | None
) -> None:
    files = {"pytorch_adapter": TENSORS, "pytorch_model_head": head}
    source = write(tmp_path / "source", ADAPTERHUB, **files)
    (source / "head_config.json").write_text(json.dumps(config))
    assert refusal(source, tmp_path / "target") == reason
    if reason is None:
        written = load_file(tmp_path / "target" / ADAPTERHUB_WEIGHTS)
        assert written.keys() == TENSORS.keys() | head.keys()


def test_other_files_that_belong_to_it_are_not_lost(tmp_path: Path) -> None:
    source = write(tmp_path / "source", ADAPTERHUB, pytorch_adapter=TENSORS)
    (source / "adapter_interface.json").write_text("{}")
    assert refusal(source, tmp_path / "target") == "UNSUPPORTED_FEATURE"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = write(tmp_path / "source", ADAPTERHUB, pytorch_adapter=TENSORS)
    assert refusal(source, source) == "TARGET_EXISTS"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source", ADAPTERHUB)
    assert refusal(source, tmp_path / "target") == "MISSING_WEIGHTS"


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "source", ADAPTERHUB, pytorch_adapter=TENSORS)
    target = tmp_path / "new" / "target"
    assert main(["convert", str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert main(["convert", str(source), str(target)]) == 1
    assert capsys.readouterr().err == f"deltamux convert: {target} is there already\n"
    assert main(["convert", str(source), str(target / CONFIG / "below")]) == 1
    assert "File exists" in capsys.readouterr().err


def refusal(source: Path, target: Path) -> str | None:
    try:
        convert(source, target)
    except DeltamuxError as error:
        assert target == source or not target.exists()
        return error.reason
    return None
