"""Snapshots of the Hugging Face cache open, whose files are links; no other link is followed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS, open_config, open_weights
from deltamux.adapters.checkpoint.hub_cache import stored_path
from deltamux.errors import InvalidArgument
from deltamux.store.digest import content_digest, fingerprint

REVISION = "5b8a3fbbd9a4ef8f7a1c1c1f0d0b2f4be1c1a1aa"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """As huggingface_hub lays it out."""
    repository = tmp_path / "hub" / "models--org--adapter"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "aa11").write_bytes(b"config")
    (repository / "blobs" / "bb22").write_bytes(b"weights")
    return repository


def snapshot(repository: Path, config: str, weights: str = "../../blobs/bb22") -> Path:
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True)
    (folder / CONFIG).symlink_to(config)
    (folder / WEIGHTS).symlink_to(weights)
    return folder


def test_a_snapshot_opens(repository: Path) -> None:
    folder = snapshot(repository, "../../blobs/aa11")
    with open_config(folder) as config, open_weights(folder) as weights:
        assert (config.read(), weights.read()) == (b"config", b"weights")


def test_a_folder_in_a_snapshot_opens(repository: Path) -> None:
    folder = repository / "snapshots" / REVISION / "checkpoint-8"
    folder.mkdir(parents=True)
    (folder / CONFIG).symlink_to("../../../blobs/aa11")
    with open_config(folder) as config:
        assert config.read() == b"config"


def test_an_absolute_link_and_a_link_to_the_snapshot_open(repository: Path, tmp_path: Path) -> None:
    """Where the cache lies on another volume, and where a folder of adapters collects snapshots."""
    folder = snapshot(repository, str(repository / "blobs" / "aa11"))
    (tmp_path / "mine").symlink_to(folder)
    with open_config(tmp_path / "mine") as config, open_weights(tmp_path / "mine") as weights:
        assert (config.read(), weights.read()) == (b"config", b"weights")


def test_a_snapshot_is_what_its_files_are(repository: Path, tmp_path: Path) -> None:
    folder = snapshot(repository, "../../blobs/aa11")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / CONFIG).write_bytes(b"config")
    (plain / WEIGHTS).write_bytes(b"weights")
    assert content_digest(folder) == content_digest(plain)
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    (repository / "blobs" / "bb22").write_bytes(b"rewritten")
    assert fingerprint(folder) != before


def outside(repository: Path) -> str:
    (repository.parent / "secret").write_bytes(b"secret")
    return "../../../secret"


def sibling(repository: Path) -> str:
    other = repository.parent / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "aa11").write_bytes(b"secret")
    return "../../../models--org--other/blobs/aa11"


def link_among_blobs(repository: Path) -> str:
    outside(repository)
    (repository / "blobs" / "cc33").symlink_to("../../secret")
    return "../../blobs/cc33"


def folder_among_blobs(repository: Path) -> str:
    (repository / "blobs" / "deep").mkdir()
    (repository / "blobs" / "deep" / "dd44").write_bytes(b"secret")
    return "../../blobs/deep/dd44"


def blobs_elsewhere(repository: Path) -> str:
    (repository / "blobs").rename(repository.parent / "elsewhere")
    (repository / "blobs").symlink_to("../elsewhere")
    return "../../blobs/aa11"


def pipe(repository: Path) -> str:
    os.mkfifo(repository / "blobs" / "ee55")
    return "../../blobs/ee55"


def beside(repository: Path) -> str:
    (repository / "config").write_bytes(b"secret")
    return "../../config"


def loop(repository: Path) -> str:
    return CONFIG


@pytest.mark.parametrize(
    "make",
    [
        outside,
        sibling,
        link_among_blobs,
        folder_among_blobs,
        blobs_elsewhere,
        pipe,
        beside,
        loop,
        lambda _: "/etc/passwd",
        lambda _: "../../blobs/../../secret",
        lambda _: "../../blobs/..",
        lambda _: "../../blobs",
    ],
)
def test_other_links_of_a_snapshot_are_refused(
    repository: Path, make: Callable[[Path], str]
) -> None:
    folder = snapshot(repository, make(repository))
    with pytest.raises(InvalidArgument) as caught:
        open_config(folder)
    assert caught.value.reason == "BAD_FILE"


@pytest.mark.parametrize(
    "names", [("org--adapter", "snapshots"), ("models--org--adapter", "revisions")]
)
def test_the_same_links_elsewhere_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    repository = tmp_path / names[0]
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "aa11").write_bytes(b"config")
    folder = repository / names[1] / REVISION
    folder.mkdir(parents=True)
    (folder / CONFIG).symlink_to("../../blobs/aa11")
    assert stored_path(folder / CONFIG) == folder / CONFIG
    with pytest.raises(InvalidArgument):
        open_config(folder)
