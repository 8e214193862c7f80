"""Rewrites an adapter that was saved as a pickle, or with its head in another file."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from deltamux.adapters.checkpoint.files import (
    ADAPTERHUB_WEIGHTS,
    CONFIG,
    HEAD_CONFIG,
    PICKLES,
    WEIGHTS,
    open_config,
    open_regular,
    require_alone,
)
from deltamux.adapters.checkpoint.header import read_header
from deltamux.adapters.checkpoint.manifest import read_manifest
from deltamux.adapters.checkpoint.precheck import check_folder
from deltamux.adapters.checkpoint.strict_json import parse_object, quoted
from deltamux.errors import FailedPrecondition, InvalidArgument, first_line

_SAFE = (WEIGHTS, ADAPTERHUB_WEIGHTS, "model_head.safetensors")
_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
# All that a head of a generating model consists of.
_LANGUAGE_HEAD = {"lm_head.weight"}


def convert(source: Path, target: Path) -> Path:
    """Writes the adapter in `source` to the new folder `target`, as safetensors in one file.

    A pickle is read by torch's unpickler for weights, which makes tensors and runs nothing else.
    A language head that AdapterHub saved beside the adapter goes into the same file.
    Raises InvalidArgument for files that are malformed and a target that is there already, OSError
    for one that cannot be written.
    """
    if os.path.lexists(target):
        raise InvalidArgument(f"{target} is there already", reason="TARGET_EXISTS")
    library = read_manifest(source).library
    require_alone(source, but=HEAD_CONFIG)
    tensors = _read(source, (WEIGHTS, ADAPTERHUB_WEIGHTS, *PICKLES)) | _read_head(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        with open_config(source) as config, open(folder / CONFIG, "xb") as copy:
            shutil.copyfileobj(config, copy)
        name = ADAPTERHUB_WEIGHTS if library == "adapterhub" else WEIGHTS
        save_file(tensors, folder / name, metadata={"format": "pt"})
        check_folder(folder)
        os.rename(folder, target)
    return target


def _read_head(source: Path) -> dict[str, Tensor]:
    """The weight of a language head; nothing where none was saved.

    Raises FailedPrecondition for any other head.
    """
    if not os.path.lexists(source / HEAD_CONFIG):
        return {}
    with open_regular(source / HEAD_CONFIG) as file:
        config = parse_object(file.read(), HEAD_CONFIG)
    head = _read(source, _HEADS)
    if config.get("config") is not None or head.keys() != _LANGUAGE_HEAD:
        raise FailedPrecondition(
            f"{HEAD_CONFIG} is there: its prediction head is not served",
            reason="UNSUPPORTED_FEATURE",
        )
    return head


def _read(source: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of the first of these files that is there, each with memory of its own."""
    for name in names:
        try:
            file = open_regular(source / name)
        except FileNotFoundError:
            continue
        with file:
            data = _load(file) if name in _SAFE else _unpickle(file)
        return {key: tensor.clone().contiguous() for key, tensor in data.items()}
    raise InvalidArgument(f"none of {', '.join(names)} is there", reason="MISSING_WEIGHTS")


def _load(file: BinaryIO) -> dict[str, Tensor]:
    read_header(file)
    file.seek(0)
    tensors: dict[str, Tensor] = load(file.read())
    return tensors


def _unpickle(file: BinaryIO) -> dict[str, Tensor]:
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InvalidArgument(
            f"the pickle holds more than tensors, or is broken: {quoted(first_line(error))}",
            reason="PICKLE_REFUSED",
        ) from None
    if not isinstance(data, dict) or not all(map(_is_named_tensor, data.items())):
        raise InvalidArgument("the pickle is no table of tensors", reason="PICKLE_REFUSED")
    return data


def _is_named_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
