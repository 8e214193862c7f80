"""The folder of the sockets between the processes of one server, which only this user can open."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from deltamux.errors import StartupError

# Only folders of this name are ever looked into for what to clean up.
_PREFIX = "deltamux-sockets-"


class PrivateFolder:
    """Locked for as long as its process lives, however that ends.

    A new one sweeps away those whose lock is free: their servers were killed.
    """

    def __init__(self) -> None:
        """Raises StartupError where no temporary folder can be made."""
        try:
            root = Path(tempfile.gettempdir())
            sweep(root)
            # It gets its name when it has its lock, so that nobody takes it for one left behind.
            made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=root))
        except OSError as error:
            raise StartupError(f"no folder for sockets: {error}") from error
        self._lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(root / made.name.removeprefix("."))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(root: Path) -> None:
    """Removes this user's folders below `root` whose servers are gone; leaves all it cannot."""
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with suppress(OSError):
                    _remove_abandoned(Path(entry.path))


def _remove_abandoned(folder: Path) -> None:
    """Raises OSError where the folder is locked, a link, or holds more than sockets."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(lock).st_uid != os.getuid():
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in os.listdir(lock):
            if stat.S_ISSOCK(os.stat(name, dir_fd=lock, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=lock)
        folder.rmdir()
    finally:
        os.close(lock)
