"""What can be said of an adapter's files without torch and without the base model."""

from __future__ import annotations

from pathlib import Path

from deltamux.adapters.checkpoint.header import check_weights
from deltamux.adapters.checkpoint.manifest import read_manifest
from deltamux.adapters.checkpoint.tokenizer_file import read_tokenizer


def check_folder(folder: Path) -> None:
    """Raises InvalidArgument unless its files are well formed; reads no weights.

    A folder that passes may still be refused by `parse_adapter`, which knows the base.
    """
    read_manifest(folder)
    check_weights(folder)
    read_tokenizer(folder)
