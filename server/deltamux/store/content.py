"""The two files that are an adapter: opened without surprises, and the digest of their content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from deltamux.errors import InvalidArgument

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)

_CHUNK_BYTES = 1 << 20


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


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; never follows a link and never waits on a FIFO.

    Raises InvalidArgument for anything that is not a regular file, OSError as `os.open` does.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise _not_regular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of the file in pieces of at most 1 MiB."""
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def content_digest(folder: Path) -> str:
    """Digest of the adapter files in `folder`, as 64 hexadecimal characters."""
    digest = ContentDigest()
    for name in FILES:
        with open_regular(folder / name) as file:
            digest.begin(name, os.fstat(file.fileno()).st_size)
            for chunk in chunks(file):
                digest.update(chunk)
    return digest.hexdigest()


def fingerprint(folder: Path) -> tuple[tuple[int, ...], ...]:
    """What changes when a file is replaced or written: compares two moments without reading."""
    return tuple(file_fingerprint(os.lstat(folder / name)) for name in FILES)


def file_fingerprint(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _not_regular(path: Path) -> InvalidArgument:
    return InvalidArgument(
        f"{path.name} must be a regular file, not a link, a pipe, a device or a folder",
        reason="NOT_A_REGULAR_FILE",
    )
