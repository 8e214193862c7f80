"""Adapters on local disk: verified copies, each in a folder named by the digest of its content."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

import structlog

from deltamux.errors import (
    Aborted,
    DeltamuxError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from deltamux.store.digest import (
    ContentDigest,
    Fingerprint,
    chunks,
    fingerprint,
    fingerprint_of,
    opened,
)

# Then the id of the process that works in it.
_TEMPORARY = ".tmp-"
_DIGEST = re.compile(r"[0-9a-f]{64}")

# Trainers save them beside an adapter; requests of every adapter use the base's own.
_UNUSED = ("chat_template.jinja", "generation_config.json")

_log = structlog.get_logger(__name__)


class DiskTier:
    """Least recently used copies go when `capacity_bytes` are taken, unless someone holds them.

    A copy appears by one rename, complete and synced, or not at all; after a crash, one whose new
    name was not synced yet is made again. Several servers may share the folder. Methods may be
    called from any thread; only `ingest` and `purge` take long.
    """

    def __init__(
        self,
        cache_dir: Path,
        capacity_bytes: int,
        max_adapter_bytes: int,
        check: Callable[[Path], None],
    ) -> None:
        """`check(folder)` raises if the files of a new copy are malformed."""
        self.used_bytes = 0
        self._root = cache_dir.expanduser()
        self._capacity_bytes = capacity_bytes
        self._max_adapter_bytes = min(max_adapter_bytes, capacity_bytes)
        self._check = check
        self._lock = threading.Lock()
        # Bytes of each copy, least recently used first.
        self._copies: OrderedDict[str, int] = OrderedDict()
        self._holds: Counter[str] = Counter()
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()

    def __contains__(self, digest: str) -> bool:
        return digest in self._copies

    def path(self, digest: str) -> Path:
        """Where the copy is, or would be."""
        return self._root / digest

    def hold(self, digest: str) -> bool:
        """Keeps a copy from eviction until `unhold`; False if there is none."""
        with self._lock:
            if digest not in self._copies:
                return False
            self._copies.move_to_end(digest)
            self._holds[digest] += 1
            return True

    def unhold(self, digest: str) -> None:
        """Ends one hold."""
        with self._lock:
            self._holds[digest] -= 1
            if not self._holds[digest]:
                del self._holds[digest]

    def ingest(self, source: Path) -> str:
        """Copies the adapter in `source` and returns its digest, with one hold taken.

        Raises InvalidArgument for files that are malformed or not regular, ResourceExhausted
        for those too large or a full disk, Aborted if they change while they are read.
        """
        try:
            _require_folder(source)
            with opened(source) as files:
                before = fingerprint_of(files.values())
                size = self._size(before)
                with self._temporary_folder() as temporary, self._reserved(size):
                    digest = _copy(files, before, temporary)
                    if fingerprint(source) != before:
                        raise _changed()
                    self._check(temporary)
                    self._publish(temporary, digest, size)
        except OSError as error:
            raise _translated(error) from error
        if unused := [name for name in _UNUSED if os.path.lexists(source / name)]:
            _log.warning("files beside an adapter are not used", version=digest, files=unused)
        return digest

    def purge(self, digest: str) -> None:
        """Deletes a copy, held or not."""
        with self._lock:
            trash = [self._detach(digest)] if digest in self._copies else []
        _delete(trash)

    def _size(self, files: Fingerprint) -> int:
        size = sum(state.size for state in files)
        if size > self._max_adapter_bytes:
            raise ResourceExhausted(
                f"the adapter has {size} bytes; at most {self._max_adapter_bytes} are accepted",
                reason="ADAPTER_TOO_LARGE",
            )
        return size

    @contextmanager
    def _reserved(self, size: int) -> Iterator[None]:
        """Counts `size` bytes as used meanwhile, evicting others for them."""
        trash = []
        with self._lock:
            while self.used_bytes + size > self._capacity_bytes:
                victim = next((d for d in self._copies if d not in self._holds), None)
                if victim is None:
                    break
                trash.append(self._detach(victim))
            full = self.used_bytes + size > self._capacity_bytes
            self.used_bytes += 0 if full else size
        _delete(trash)
        if full:
            raise ResourceExhausted(
                "the disk tier is full of adapters in use", reason="DISK_FULL", retry_after=5.0
            )
        try:
            yield
        finally:
            with self._lock:
                self.used_bytes -= size

    @contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        folder = self._work_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, temporary: Path, digest: str, size: int) -> None:
        """Makes the copy visible; a copy of the same content that is there already stays."""
        _sync(temporary)
        with self._lock:
            try:
                os.rename(temporary, self.path(digest))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            self._add(digest, size)
            self._holds[digest] += 1

    def _add(self, digest: str, size: int) -> None:
        if digest not in self._copies:
            self._copies[digest] = size
            self.used_bytes += size
        self._copies.move_to_end(digest)

    def _detach(self, digest: str) -> Path:
        """Takes a copy out of sight at once; deleting its files is left to the caller."""
        self.used_bytes -= self._copies.pop(digest)
        trash = self._work_folder()
        # Another server that shares the folder may have been faster.
        with suppress(FileNotFoundError):
            os.rename(self.path(digest), trash / digest)
        return trash

    def _work_folder(self) -> Path:
        """A folder of this process's own, also where somebody has deleted the cache."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-", dir=self._root))

    def _sweep(self) -> None:
        """Takes over the copies of earlier runs, and deletes what those left unfinished."""
        folders = [e for e in os.scandir(self._root) if e.is_dir(follow_symlinks=False)]
        for entry in sorted(folders, key=_changed_last):
            if entry.name.startswith(_TEMPORARY):
                if not _is_running(entry.name.removeprefix(_TEMPORARY).partition("-")[0]):
                    shutil.rmtree(entry.path, ignore_errors=True)
            elif _DIGEST.fullmatch(entry.name):
                self._adopt(entry.name)

    def _adopt(self, digest: str) -> None:
        try:
            size = sum(state.size for state in fingerprint(self.path(digest)))
        except FileNotFoundError:
            shutil.rmtree(self.path(digest), ignore_errors=True)
        else:
            self._add(digest, size)


def _changed_last(entry: os.DirEntry[str]) -> int:
    """In nanoseconds; 0 where another server has just taken it away."""
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _require_folder(source: Path) -> None:
    if not source.is_dir():
        raise InvalidArgument(
            "the source is not a folder", reason="SOURCE_NOT_FOUND", field="source"
        )


def _copy(files: Mapping[str, BufferedReader], states: Fingerprint, folder: Path) -> str:
    """Copies the files, synced, and returns the digest of what was written.

    Raises Aborted where one has fewer bytes than its state says; more are left unread.
    """
    digest = ContentDigest()
    for (name, original), state in zip(files.items(), states, strict=True):
        digest.begin(name, state.size)
        with open(folder / name, "xb") as copy:
            for chunk in chunks(original, state.size):
                digest.update(chunk)
                copy.write(chunk)
            if copy.tell() != state.size:
                raise _changed()
            copy.flush()
            os.fsync(copy.fileno())
    return digest.hexdigest()


def _changed() -> Aborted:
    return Aborted(
        "the adapter's files changed while they were read", reason="SOURCE_CHANGED", retry_after=1.0
    )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether another process of this id runs: then the folder is still its own."""
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _translated(error: OSError) -> DeltamuxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            "--adapter-cache-dir: the disk is full", reason="DISK_FULL", retry_after=30.0
        )
    if isinstance(error, FileNotFoundError):
        return _changed()
    return Unavailable(
        f"the adapter's files could not be copied: {os.strerror(error.errno or errno.EIO)}",
        reason="DISK_ERROR",
        retry_after=5.0,
    )
