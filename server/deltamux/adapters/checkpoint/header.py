"""Checks a safetensors file by its header alone, before a byte of weights is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from deltamux.adapters.checkpoint.files import WEIGHTS, open_weights
from deltamux.adapters.checkpoint.strict_json import Json, parse_object, quoted
from deltamux.errors import InvalidArgument

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 16_384

_MAX_DIMENSIONS = 8
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")
# The integers are places in a matrix, never weights.
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I16": 2, "I32": 4, "I64": 8}

# How files begin that are often found under the name of a safetensors file.
_IMPOSTORS = (
    (b"version https://git-lfs", "a git-lfs pointer; `git lfs pull` fetches the file itself"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    (b"GGUF", "a GGUF file"),
    (b"<", "an HTML or XML page"),
    (b"\x80", "a Python pickle"),
)

# Of a shape, or a place in the file.
_Size = Annotated[int, msgspec.Meta(ge=0)]


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the file; the offsets are bytes from the start of the data."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]

    @property
    def size(self) -> int:
        """In bytes."""
        begin, end = self.data_offsets
        return end - begin


# msgspec finds out what a type holds when it first meets it, and crashes for a thread that comes
# meanwhile: it meets this one before any thread does.
msgspec.json.Decoder(TensorInfo)


def check_weights(folder: Path) -> Mapping[str, TensorInfo]:
    """The tensors that adapter_model.safetensors declares. Raises InvalidArgument."""
    with open_weights(folder) as file:
        return read_header(file)


def read_header(file: BinaryIO) -> Mapping[str, TensorInfo]:
    """Reads and checks the header of a file opened at its start; the file is left at its data.

    The tensors have plain names and dtypes, fill the file's data exactly and come in its order.
    Some may be empty: AdaLoRA leaves nothing of a module whose whole rank it cut.
    Raises InvalidArgument with reason NOT_SAFETENSORS, TOO_LARGE, MALFORMED_JSON or
    MALFORMED_WEIGHTS.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    length = int.from_bytes(start[:8], "little")
    _check_start(start, length, size)
    file.seek(8)
    header = parse_object(file.read(length), f"the header of {WEIGHTS}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed("__metadata__ is not a map of strings")
    if len(header) > MAX_TENSORS:
        raise _malformed(f"it has {len(header)} tensors, more than {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    return _in_order(tensors, size - 8 - length)


def _check_start(start: bytes, length: int, size: int) -> None:
    if start[8:9] != b"{":
        for magic, what in _IMPOSTORS:
            if start.startswith(magic):
                raise _not_safetensors(f"it is {what}")
    if size < 8:
        raise _not_safetensors(f"it has {size} bytes")
    if length > size - 8:
        raise _malformed(f"its header of {length} bytes is longer than the file of {size} bytes")
    if length > MAX_HEADER_BYTES:
        raise InvalidArgument(
            f"the header of {WEIGHTS} has {length} bytes, more than {MAX_HEADER_BYTES}",
            reason="TOO_LARGE",
        )


def _tensor(name: str, entry: Json) -> TensorInfo:
    if not _NAME.fullmatch(name) or ".." in name:
        raise _malformed(f"{quoted(name)} is no name of a tensor")
    try:
        info = msgspec.convert(entry, TensorInfo)
    except msgspec.ValidationError as error:
        raise _malformed(f"the entry of {name}: {quoted(str(error))}") from None
    if info.dtype not in _ITEM_BYTES:
        raise _malformed(
            f"{name} has dtype {quoted(info.dtype)}; adapters have {', '.join(_ITEM_BYTES)}"
        )
    if not info.shape:
        raise _malformed(f"{name} is a single number; adapters have vectors and matrices")
    if math.prod(info.shape) * _ITEM_BYTES[info.dtype] != info.size:
        raise _malformed(f"{name} has shape {info.shape} but {info.size} bytes")
    return info


def _in_order(tensors: Mapping[str, TensorInfo], size: int) -> dict[str, TensorInfo]:
    """By their data, which has no gap, no overlap and nothing behind the last tensor."""
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].data_offsets))
    position = 0
    for name, info in ordered.items():
        begin, end = info.data_offsets
        if begin != position:
            raise _malformed(f"{name} begins at byte {begin} of the data, not at {position}")
        position = end
    if position != size:
        raise _malformed(f"its tensors end at byte {position} of {size} bytes of data")
    return ordered


def _malformed(why: str) -> InvalidArgument:
    return InvalidArgument(f"{WEIGHTS} is malformed: {why}", reason="MALFORMED_WEIGHTS")


def _not_safetensors(why: str) -> InvalidArgument:
    return InvalidArgument(f"{WEIGHTS} is not a safetensors file: {why}", reason="NOT_SAFETENSORS")
