"""The files that are an adapter, opened as regular files and never as anything else."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from deltamux.adapters.checkpoint.hub_cache import stored_path
from deltamux.errors import FailedPrecondition, InvalidArgument

CONFIG = "adapter_config.json"
# As PEFT saves them; whatever they were called, this is the name of our own copies.
WEIGHTS = "adapter_model.safetensors"
ADAPTERHUB_WEIGHTS = "adapter.safetensors"
PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")
# Weights in several files, and what says which holds what: uploaded at times, read by no library.
_PARTS = ("adapter_model-*-of-*", "adapter_model.*.index.json")
# The config of the model that was trained, which may lie beside and names the labels of its head.
MODEL_CONFIG = "config.json"
# The tokenizer of the model that was trained, which may lie beside and have more tokens.
TOKENIZER = "tokenizer.json"

# What AdapterHub saves beside an adapter, and changes what it computes.
HEAD_CONFIG = "head_config.json"
_COMPANIONS = {
    HEAD_CONFIG: "a prediction head; `deltamux convert` takes in a language head",
    "adapter_interface.json": "how a custom model takes adapters",
    "adapter_fusion_config.json": "a fusion of several adapters",
}

_OTHER_KINDS = "links, pipes, devices and directories are refused"


def open_config(folder: Path) -> BufferedReader:
    """Opens adapter_config.json. Raises InvalidArgument where it is missing or no regular file."""
    try:
        return open_regular(folder / CONFIG)
    except FileNotFoundError:
        raise InvalidArgument(f"{CONFIG} is missing", reason="MISSING_CONFIG") from None


def open_model_config(folder: Path) -> BufferedReader:
    """Opens config.json. Raises FileNotFoundError: an adapter need not have it."""
    return open_regular(folder / MODEL_CONFIG)


def open_tokenizer(folder: Path) -> BufferedReader:
    """Opens tokenizer.json. Raises FileNotFoundError: an adapter need not have it."""
    return open_regular(folder / TOKENIZER)


def weights_name(folder: Path | str) -> str:
    """What the file of the weights is called, or would be."""
    return ADAPTERHUB_WEIGHTS if os.path.lexists(f"{folder}/{ADAPTERHUB_WEIGHTS}") else WEIGHTS


def open_weights(folder: Path) -> BufferedReader:
    """Opens the weights. A pickle in their place is refused by name, never read.

    Raises FailedPrecondition for what belongs to the adapter in further files.
    """
    name = weights_name(folder)
    if name == ADAPTERHUB_WEIGHTS:
        require_alone(folder)
        if os.path.lexists(folder / WEIGHTS):
            raise InvalidArgument(f"{name} and {WEIGHTS} are both there", reason="BAD_FILE")
    try:
        return open_regular(folder / name)
    except FileNotFoundError:
        raise _missing_weights(folder) from None


def require_alone(folder: Path, but: str | None = None) -> None:
    """Raises FailedPrecondition for files beside the adapter that belong to it, `but` for one."""
    for name, what in _COMPANIONS.items():
        if name != but and os.path.lexists(folder / name):
            raise FailedPrecondition(
                f"{name} is there: {what}; it is not served", reason="UNSUPPORTED_FEATURE"
            )


def _missing_weights(folder: Path) -> InvalidArgument:
    for name in PICKLES:
        if os.path.lexists(folder / name):
            return InvalidArgument(
                f"{name} is a pickle, which can run code and is never read here; "
                "`deltamux convert` makes safetensors of it",
                reason="PICKLE_REFUSED",
            )
    why = f"{WEIGHTS} is missing"
    if parts := sorted(path.name for pattern in _PARTS for path in folder.glob(pattern)):
        why += f", and {parts[0]} is one of several; PEFT reads one file alone: save all in it"
    return InvalidArgument(why, reason="MISSING_WEIGHTS")


def open_regular(path: Path) -> BufferedReader:
    """Follows no link but a Hub snapshot's to its own blob, and never waits on a FIFO.

    Raises FileNotFoundError, InvalidArgument.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(stored_path(path), flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        # What the system says of a link that is not followed is "too many levels".
        why = _OTHER_KINDS if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
        raise _not_regular(path, why) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path, _OTHER_KINDS)
    return os.fdopen(descriptor, "rb")


def _not_regular(path: Path, why: str) -> InvalidArgument:
    return InvalidArgument(f"{path.name} is not a readable regular file: {why}", reason="BAD_FILE")
