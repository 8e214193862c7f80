"""The two files that are an adapter, opened as regular files and never as anything else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from deltamux.errors import InvalidArgument

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


def open_config(folder: Path) -> BinaryIO:
    """Opens adapter_config.json. Raises InvalidArgument where it is missing or no regular file."""
    try:
        return _open_regular(folder / CONFIG)
    except FileNotFoundError:
        raise InvalidArgument(f"{CONFIG} is missing", reason="MISSING_CONFIG") from None


def open_weights(folder: Path) -> BinaryIO:
    """Opens adapter_model.safetensors. A pickle in its place is refused by name, never read."""
    try:
        return _open_regular(folder / WEIGHTS)
    except FileNotFoundError:
        if os.path.lexists(folder / PICKLED_WEIGHTS):
            raise InvalidArgument(
                f"{PICKLED_WEIGHTS} is a pickle, which can run code and is never read; "
                f"save the adapter as {WEIGHTS}",
                reason="PICKLE_REFUSED",
            ) from None
        raise InvalidArgument(f"{WEIGHTS} is missing", reason="MISSING_WEIGHTS") from None


def _open_regular(path: Path) -> BinaryIO:
    """Never follows a link and never waits on a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _not_regular(path, os.strerror(error.errno or 0)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path, "links, pipes, devices and directories are refused")
    return os.fdopen(descriptor, "rb")


def _not_regular(path: Path, why: str) -> InvalidArgument:
    return InvalidArgument(f"{path.name} is not a readable regular file: {why}", reason="BAD_FILE")
