"""The content of an adapter's files: its digest, and how to see that it changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from deltamux.adapters.checkpoint.files import (
    CONFIG,
    MODEL_CONFIG,
    TOKENIZER,
    WEIGHTS,
    open_config,
    open_model_config,
    open_tokenizer,
    open_weights,
    weights_path,
)
from deltamux.adapters.checkpoint.hub_cache import stored_path

_OPENERS: dict[str, Callable[[Path], BinaryIO]] = {CONFIG: open_config, WEIGHTS: open_weights}
# An adapter need not have them.
_OPTIONAL: dict[str, Callable[[Path], BinaryIO]] = {
    MODEL_CONFIG: open_model_config,
    TOKENIZER: open_tokenizer,
}

# Of each file: device, inode, size, and when its content and its inode last changed.
Fingerprint = tuple[tuple[int, ...], ...]

# The second level of a processor's cache holds it: it is copied and hashed there, in memory that
# the next piece gets too.
_CHUNK_BYTES = 1 << 18


def openers(folder: Path) -> dict[str, Callable[[Path], BinaryIO]]:
    """How each of the folder's files is opened, in the order in which the digest takes them."""
    there = {name: opened for name, opened in _OPTIONAL.items() if os.path.lexists(folder / name)}
    return _OPENERS | there


class ContentDigest:
    """SHA-256 over each file's name and bytes, both length-prefixed to tell all contents apart."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def begin(self, name: str, size: int) -> None:
        """Starts the next file; exactly `size` bytes of `update` follow."""
        encoded = name.encode()
        self._hash.update(len(encoded).to_bytes(8, "little") + encoded)
        self._hash.update(size.to_bytes(8, "little"))

    def update(self, chunk: bytes) -> None:
        self._hash.update(chunk)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of the file in pieces of at most 256 KiB."""
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def content_digest(folder: Path) -> str:
    """Digest of the adapter files in `folder`, as 64 hexadecimal characters."""
    digest = ContentDigest()
    for name, opened in openers(folder).items():
        with opened(folder) as file:
            digest.begin(name, os.fstat(file.fileno()).st_size)
            for chunk in chunks(file):
                digest.update(chunk)
    return digest.hexdigest()


def fingerprint(folder: Path) -> Fingerprint:
    """What changes when a file is written or replaced; costs no reading. Raises OSError."""
    paths = [weights_path(folder) if name == WEIGHTS else folder / name for name in openers(folder)]
    return tuple([_fingerprint(path) for path in paths])


def _fingerprint(path: Path) -> tuple[int, ...]:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        status = os.lstat(stored_path(path))
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
