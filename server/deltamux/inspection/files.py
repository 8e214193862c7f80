"""What the two files of an adapter tell without a base model, their weights unread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltamux.adapters.checkpoint.header import TensorInfo, check_weights
from deltamux.adapters.checkpoint.manifest import read_manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.parse import family_of


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the file's header declares it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Files:
    """`family` is the one that would serve the adapter; `fields` are those of its config."""

    library: str
    type: str
    family: str
    fields: Mapping[str, Json]
    tensors: tuple[StoredTensor, ...]

    @property
    def numbers(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype."""
        return dict(Counter(tensor.dtype for tensor in self.tensors))

    def as_json(self) -> dict[str, Any]:
        totals = {"numbers": self.numbers, "bytes": self.bytes, "dtypes": self.dtypes}
        return asdict(self) | totals


def inspect_files(folder: Path) -> Files:
    """Raises InvalidArgument for broken files, FailedPrecondition for a type that is not served."""
    manifest = read_manifest(folder)
    family = family_of(manifest)
    tensors = check_weights(folder)
    return Files(
        manifest.library,
        manifest.type,
        family.name,
        manifest.fields,
        tuple(_stored(name, info) for name, info in sorted(tensors.items())),
    )


def _stored(name: str, info: TensorInfo) -> StoredTensor:
    return StoredTensor(name, info.dtype, info.shape, info.size)
