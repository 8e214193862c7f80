"""The digest is pinned: it names copies on disk and versions that clients hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from deltamux.errors import InvalidArgument
from deltamux.store.digest import content_digest, fingerprint


def write(folder: Path, config: bytes, weights: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_digest_is_of_length_prefixed_names_and_bytes(tmp_path):
    framed = b"".join(
        len(part).to_bytes(8, "little") + part
        for part in (b"adapter_config.json", b"{}", b"adapter_model.safetensors", b"weights")
    )
    expected = hashlib.sha256(framed).hexdigest()
    assert content_digest(write(tmp_path / "a", b"{}", b"weights")) == expected
    assert expected == "26d1c7593b9650cb489a9a1fe2fad9def32c75ec2685cf8261c3c0fa3b73e315"


def test_bytes_that_move_from_one_file_to_the_other_change_the_digest(tmp_path):
    one = content_digest(write(tmp_path / "a", b"{}x", b"y"))
    assert one != content_digest(write(tmp_path / "b", b"{}", b"xy"))


def test_fingerprint_sees_a_replaced_file_of_equal_size(tmp_path):
    folder = write(tmp_path / "a", b"{}", b"one")
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    (tmp_path / "new").write_bytes(b"two")
    (tmp_path / "new").rename(folder / "adapter_model.safetensors")
    assert fingerprint(folder) != before


def test_a_link_is_not_followed(tmp_path):
    folder = write(tmp_path / "a", b"{}", b"one")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("/etc/hostname")
    with pytest.raises(InvalidArgument):
        content_digest(folder)


def test_weights_under_another_library_s_name_are_the_same_content(tmp_path):
    named = write(tmp_path / "a", b"{}", b"weights")
    other = write(tmp_path / "b", b"{}", b"weights")
    (other / "adapter_model.safetensors").rename(other / "adapter.safetensors")
    assert content_digest(other) == content_digest(named)
    before = fingerprint(other)
    (other / "adapter.safetensors").write_bytes(b"changed")
    assert fingerprint(other) != before


def test_a_model_s_config_beside_the_adapter_is_part_of_it(tmp_path):
    plain, named = (write(tmp_path / name, b"{}", b"weights") for name in "ab")
    before = fingerprint(named)
    (named / "config.json").write_text('{"id2label": {"0": "a"}}')
    assert content_digest(named) != content_digest(plain)
    assert fingerprint(named) != before
    (named / "config.json").unlink()
    (named / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(InvalidArgument):
        content_digest(named)
