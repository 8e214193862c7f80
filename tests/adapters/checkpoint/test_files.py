"""Only regular files are opened, without following links or waiting on pipes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deltamux.adapters.checkpoint.files import (
    ADAPTERHUB_WEIGHTS,
    CONFIG,
    PICKLES,
    WEIGHTS,
    open_config,
    open_weights,
)
from deltamux.errors import DeltamuxError, InvalidArgument


def test_regular_files_open(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(b"config")
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    with open_config(tmp_path) as config, open_weights(tmp_path) as weights:
        assert (config.read(), weights.read()) == (b"config", b"weights")


def symlink(path: Path) -> None:
    path.with_name("target").write_bytes(b"{}")
    path.symlink_to("target")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(symlink, id="BI-28 symlink"),
        pytest.param(os.mkfifo, id="BI-28 FIFO"),
        pytest.param(os.mkdir, id="BI-28 directory"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="BI-28 device"),
    ],
)
@pytest.mark.parametrize(("name", "opener"), [(CONFIG, open_config), (WEIGHTS, open_weights)])
def test_anything_else_is_refused(
    tmp_path: Path, make: Callable[[Path], None], name: str, opener: Callable[[Path], object]
) -> None:
    make(tmp_path / name)
    with pytest.raises(InvalidArgument) as caught:
        opener(tmp_path)
    assert caught.value.reason == "BAD_FILE"
    assert name in caught.value.message
    assert "links, pipes, devices and directories are refused" in caught.value.message


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_in_place_of_the_weights_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(InvalidArgument, match=f"{name}.*deltamux convert") as caught:
        open_weights(tmp_path)
    assert caught.value.reason == "PICKLE_REFUSED"


@pytest.mark.parametrize(
    "part", ["adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"]
)
def test_weights_in_several_files_are_refused_by_name(tmp_path: Path, part: str) -> None:
    (tmp_path / part).write_bytes(b"")
    with pytest.raises(InvalidArgument, match=f"{part}.*save all in it") as caught:
        open_weights(tmp_path)
    assert caught.value.reason == "MISSING_WEIGHTS"


def test_weights_have_another_name_in_adapterhub(tmp_path: Path) -> None:
    (tmp_path / ADAPTERHUB_WEIGHTS).write_bytes(b"weights")
    with open_weights(tmp_path) as weights:
        assert weights.read() == b"weights"


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        (WEIGHTS, "BAD_FILE"),
        ("head_config.json", "UNSUPPORTED_FEATURE"),
        ("adapter_interface.json", "UNSUPPORTED_FEATURE"),
        ("adapter_fusion_config.json", "UNSUPPORTED_FEATURE"),
    ],
)
def test_what_adapterhub_saves_beside_is_not_passed_over(
    tmp_path: Path, beside: str, reason: str
) -> None:
    (tmp_path / ADAPTERHUB_WEIGHTS).write_bytes(b"weights")
    (tmp_path / beside).write_bytes(b"{}")
    with pytest.raises(DeltamuxError, match=beside) as caught:
        open_weights(tmp_path)
    assert caught.value.reason == reason


def test_missing_files_have_their_own_reasons(tmp_path: Path) -> None:
    for opener, reason in ((open_config, "MISSING_CONFIG"), (open_weights, "MISSING_WEIGHTS")):
        with pytest.raises(InvalidArgument) as caught:
            opener(tmp_path)
        assert caught.value.reason == reason
