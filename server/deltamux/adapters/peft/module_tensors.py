"""The tensors of a checkpoint by the module that they belong to; each is taken once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.adapters.payloads.base_fit import (
    differs,
    is_copy,
    other_base,
    refuse_added_tokens,
)
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition, InvalidArgument

_SHARED_PREFIX = "base_model."
PREFIX = f"{_SHARED_PREFIX}model."

_BASE_PARTS = {
    "base_layer.weight": "base weight",
    "base_layer.bias": "base bias",
    "token_adapter.base_layer.weight": "base weight",
    "weight": "base weight",
    "bias": "base bias",
}


@dataclass(frozen=True)
class Names:
    """How the names of tensors end: with the part of a module that each is.

    Those in `integers` hold whole numbers, all others weights. `shared` names tensors of no site,
    as those that all modules share; `aliases` are other ends of names, with their parts.
    """

    parts: tuple[str, ...]
    integers: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


class ModuleTensors:
    """Those of a checkpoint; `prefix` is what stands before each module.

    Raises FailedPrecondition (BASE_MISMATCH) for a module that is no site of the base.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        names: Names,
        prefix: str = PREFIX,
    ) -> None:
        self._prefix = prefix
        self._structure = structure
        self._parts = {**{part: part for part in names.parts}, **names.aliases}
        self._shared = {f"{_SHARED_PREFIX}{name}": name for name in names.shared}
        self._left: dict[tuple[str, str], tuple[str, Tensor]] = {}
        # Trained numbers in the tensors that were taken.
        self.taken = 0
        for name, tensor in tensors.items():
            key = self._split(name)
            if key in self._left:
                raise _extra(name, f"the same as {quoted(self._left[key][0])}")
            if tensor.is_floating_point() == (key[1] in names.integers):
                message = f"{WEIGHTS}: {quoted(name)} has dtype {tensor.dtype}"
                raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")
            self._left[key] = (name, tensor)

    def take(self, module: str, part: str, dimensions: int) -> Tensor:
        """The tensor of a module. Raises InvalidArgument where it is missing, mis-shaped, empty."""
        tensor = self._take((module, part), f"{part} of {module}", dimensions)
        if not tensor.numel():
            raise InvalidArgument(f"{part} of {module} is empty", reason="SHAPE_MISMATCH")
        return tensor

    def take_shaped(self, site: SiteSpec, part: str, shape: tuple[int, ...]) -> Tensor:
        """`take` in float32; raises FailedPrecondition (BASE_MISMATCH) for another shape."""
        tensor = self._take((site.name, part), f"{part} of {site.name}", len(shape))
        if tensor.shape != shape:
            raise other_base(site, f"{part} of {tuple(tensor.shape)} instead of {shape}")
        return tensor.float()

    def take_shared(self, name: str, shape: tuple[int, ...], trained: bool = True) -> Tensor:
        """A tensor of no site, weights in float32. Raises as `take_shaped` does."""
        tensor = self._take(("", name), name, len(shape), trained)
        if tensor.shape != shape:
            raise FailedPrecondition(
                f"{name} of {tuple(tensor.shape)}, where the modules of this base need {shape}",
                reason="BASE_MISMATCH",
            )
        return tensor.float() if tensor.is_floating_point() else tensor

    def drop_idle(self, part: str, is_idle: Callable[[Tensor], bool]) -> None:
        """Forgets what PEFT saves with each module beside its parameters, if it `is_idle`.

        Raises InvalidArgument (MALFORMED_WEIGHTS) where it is not.
        """
        for key in [key for key in self._left if key[1] == part]:
            name, tensor = self._left.pop(key)
            if not is_idle(tensor):
                message = f"{WEIGHTS}: {quoted(name)} is not what PEFT saves there"
                raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")

    def take_if_any(self, module: str, part: str, dimensions: int) -> Tensor | None:
        """As `take`, None where it is missing."""
        return self.take(module, part, dimensions) if (module, part) in self._left else None

    def drop_base_copies(self) -> tuple[str, ...]:
        """Forgets copies of base parameters, after making sure of it; returns a note on each.

        PEFT saves them beside adapters of embeddings. Raises FailedPrecondition
        (UNSUPPORTED_FEATURE) for one that was changed or trained.
        """
        keys = [key for key in self._left if key[1] in _BASE_PARTS.values()]
        return tuple(f"copy of the base left out: {self._drop_base_copy(*key)}" for key in keys)

    def require_none_left(self) -> None:
        """Raises InvalidArgument (EXTRA_TENSORS) if a tensor was not taken."""
        for name, _ in self._left.values():
            raise _extra(name, "nothing that the config asks for")

    def _take(
        self, key: tuple[str, str], what: str, dimensions: int, trained: bool = True
    ) -> Tensor:
        if key not in self._left:
            raise InvalidArgument(
                f"{WEIGHTS} lacks {what}, which the adapter needs", reason="MISSING_TENSORS"
            )
        name, tensor = self._left.pop(key)
        if tensor.ndim != dimensions:
            message = f"{quoted(name)} has {tensor.ndim} dimensions, not {dimensions}"
            raise InvalidArgument(message, reason="SHAPE_MISMATCH")
        if trained and tensor.is_floating_point():
            self.taken += tensor.numel()
        return tensor

    def _split(self, name: str) -> tuple[str, str]:
        if name in self._shared:
            return "", self._shared[name]
        for end, part in (*self._parts.items(), *_BASE_PARTS.items()):
            module = name.removeprefix(self._prefix).removesuffix(f".{end}")
            if name == f"{self._prefix}{module}.{end}" and module in self._structure.sites:
                return module, part
        if name.startswith(self._prefix) and name.endswith(tuple(self._parts)):
            raise FailedPrecondition(
                f"{quoted(name)} belongs to a module that the base model does not have "
                "or that takes no adapter",
                reason="BASE_MISMATCH",
            )
        raise _extra(name, "no part of an adapter of this type")

    def _drop_base_copy(self, module: str, part: str) -> str:
        name, copy = self._left.pop((module, part))
        read = self._structure.weight if part == "base weight" else self._structure.bias
        base = read(module)
        if part == "base weight":
            refuse_added_tokens(self._structure.sites[module], len(copy))
        if base is None or not is_copy(copy, base):
            raise differs(name)
        return name


def _extra(name: str, what: str) -> InvalidArgument:
    return InvalidArgument(f"{WEIGHTS}: {quoted(name)} is {what}", reason="EXTRA_TENSORS")
