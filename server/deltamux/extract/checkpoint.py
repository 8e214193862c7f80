"""A model's checkpoint in safetensors, one file or shards, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltamux.adapters.checkpoint.strict_json import parse_object
from deltamux.errors import InvalidArgument

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = ("F64", "F32", "F16", "BF16")


class ModelCheckpoint:
    """The weights in a folder as transformers saves it. Holds no tensor and no open file."""

    def __init__(self, folder: Path) -> None:
        """Raises InvalidArgument for a folder without weights in safetensors, or broken ones."""
        self.folder = folder
        self._shard_of = _shards(folder)

    @property
    def keys(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._shard_of)

    @property
    def file_bytes(self) -> int:
        """Bytes of all weights files together."""
        return sum((self.folder / shard).stat().st_size for shard in set(self._shard_of.values()))

    def read(self, key: str) -> Tensor:
        """One tensor in its own dtype, float32, float16 or bfloat16; float64 is rounded to float32,
        as for a server. Others are refused."""
        with _opened(self.folder / self._shard_of[key]) as file:
            dtype = file.get_slice(key).get_dtype()
            if dtype not in _DTYPES:
                raise InvalidArgument(
                    f"{self.folder}: {key} has dtype {dtype}; {', '.join(_DTYPES)} are read"
                )
            tensor: Tensor = file.get_tensor(key)
        return tensor.float() if dtype == "F64" else tensor


def _shards(folder: Path) -> Mapping[str, str]:
    """Name of each tensor -> the file in `folder` that holds it. transformers looks for them in the
    same order, so that what an earlier save has left is read by nobody."""
    if (folder / _SINGLE).is_file():
        with _opened(folder / _SINGLE) as file:
            shards = dict.fromkeys(file.keys(), _SINGLE)
    elif (folder / _INDEX).is_file():
        table = parse_object((folder / _INDEX).read_bytes(), str(folder / _INDEX)).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise InvalidArgument(f"{folder / _INDEX} has no weight_map")
        shards = {key: str(shard) for key, shard in table.items()}
    elif any((folder / name).exists() for name in _PICKLED):
        raise InvalidArgument(
            f"{folder} holds a pickle, which can run code and is never read; "
            "save the model again with save_pretrained"
        )
    else:
        raise InvalidArgument(f"{folder} is no model: it has neither {_SINGLE} nor {_INDEX}")
    _check_complete(folder, shards)
    return shards


def _check_complete(folder: Path, shards: Mapping[str, str]) -> None:
    for shard in sorted(set(shards.values())):
        with _opened(folder / shard) as file:
            held = set(file.keys())
        for key in sorted(key for key in shards if shards[key] == shard):
            if key not in held:
                raise InvalidArgument(
                    f"{folder}: {shard} lacks {key}, which the index places there"
                )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from None
