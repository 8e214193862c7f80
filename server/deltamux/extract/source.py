"""Where a model's files are: a folder, or what the hub gives under that id."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from deltamux.errors import InvalidArgument

_FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]


def local_folder(model: str) -> Path:
    """The model's folder, downloaded where it is a hub id; no pickle is ever fetched."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_FILES))
    # What the hub does not give, or not now, is an OSError too.
    except (HFValidationError, OSError):
        raise InvalidArgument(
            f"{model} is neither a folder nor a model that the hub can give"
        ) from None
