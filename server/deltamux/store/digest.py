"""The content of an adapter's files: its digest, and how to see that it changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from deltamux.adapters.checkpoint.files import (
    CONFIG,
    MODEL_CONFIG,
    TOKENIZER,
    WEIGHTS,
    open_config,
    open_model_config,
    open_tokenizer,
    open_weights,
    weights_name,
)
from deltamux.adapters.checkpoint.hub_cache import stored_path

_OPENERS: dict[str, Callable[[Path], BufferedReader]] = {CONFIG: open_config, WEIGHTS: open_weights}
# An adapter need not have them.
_OPTIONAL: dict[str, Callable[[Path], BufferedReader]] = {
    MODEL_CONFIG: open_model_config,
    TOKENIZER: open_tokenizer,
}


class FileState(NamedTuple):
    """Changes when the file is written or replaced; the times are of its content and its inode."""

    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int


# Of each file, in the order in which the digest takes them.
Fingerprint = tuple[FileState, ...]

# The second level of a processor's cache holds it: it is copied and hashed there, in memory that
# the next piece gets too.
_CHUNK_BYTES = 1 << 18


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, BufferedReader]]:
    """The folder's files by name, in the order in which the digest takes them.

    Raises as the functions do that open them.
    """
    with ExitStack() as files:
        yield {
            name: files.enter_context(opener(folder)) for name, opener in _openers(folder).items()
        }


class ContentDigest:
    """SHA-256 over each file's name and bytes, both length-prefixed to tell all contents apart."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def begin(self, name: str, size: int) -> None:
        """Starts the next file; exactly `size` bytes of `update` follow."""
        encoded = name.encode()
        self._hash.update(len(encoded).to_bytes(8, "little") + encoded)
        self._hash.update(size.to_bytes(8, "little"))

    def update(self, chunk: bytes | memoryview) -> None:
        self._hash.update(chunk)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def chunks(file: BufferedReader, size: int) -> Iterator[memoryview]:
    """The next `size` bytes, or as many as there are; each piece is good until the next one."""
    memory = memoryview(bytearray(min(size, _CHUNK_BYTES)))
    while count := file.readinto(memory[:size]):
        size -= count
        yield memory[:count]


def content_digest(folder: Path) -> str:
    """Digest of the adapter files in `folder`, as 64 hexadecimal characters."""
    digest = ContentDigest()
    with opened(folder) as files:
        for name, file in files.items():
            size = _state(os.fstat(file.fileno())).size
            digest.begin(name, size)
            for chunk in chunks(file, size):
                digest.update(chunk)
    return digest.hexdigest()


def fingerprint(folder: Path | str) -> Fingerprint:
    """What changes when a file is written or replaced; costs no reading. Raises OSError."""
    names = [weights_name(folder) if name == WEIGHTS else name for name in _openers(folder)]
    return tuple([_state_at(f"{folder}/{name}") for name in names])


def fingerprint_of(files: Iterable[BufferedReader]) -> Fingerprint:
    """That of the folder where they were `opened`, as long as nothing changes there."""
    return tuple([_state(os.fstat(file.fileno())) for file in files])


def _openers(folder: Path | str) -> dict[str, Callable[[Path], BufferedReader]]:
    there = {n: opener for n, opener in _OPTIONAL.items() if os.path.lexists(f"{folder}/{n}")}
    return _OPENERS | there


def _state_at(path: str) -> FileState:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        status = os.lstat(stored_path(Path(path)))
    return _state(status)


def _state(status: os.stat_result) -> FileState:
    return FileState(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )
