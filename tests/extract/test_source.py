"""A folder, or what is fetched of a model under a hub id."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from deltamux.errors import InvalidArgument
from deltamux.extract.source import local_folder

SHARD = "model-00001-of-00002.safetensors"
UPLOADED = [
    *(
        "config.json",
        SHARD,
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
    ),
    *("consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin"),
]


def test_weights_are_fetched_once_and_no_pickle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some repositories have the same weights as the model's makers name them beside."""
    fetched: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects(UPLOADED, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder("org/model") == tmp_path
    assert fetched == UPLOADED[:5]


def test_what_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InvalidArgument, match="neither a folder nor a model"):
        local_folder("org/model")
