"""The tensors of an AdapterHub checkpoint by name; each is taken once."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.errors import FailedPrecondition, InvalidArgument

# Stands beside the model, whose prefix it never has.
LANGUAGE_HEAD = "lm_head.weight"


def require_one_form(names: Collection[str], prefix: str) -> None:
    """Raises InvalidArgument (EXTRA_TENSORS) for a name without the prefix that others have.

    AdapterHub reads a file as that of a bare model or as one that has a head, never as both.
    """
    inside = {name for name in names if name.startswith(f"{prefix}.")}
    for name in names if inside else ():
        if name not in inside and name != LANGUAGE_HEAD:
            raise _extra(name, f"without the {quoted(prefix)} that other names begin with")


class KeyedTensors:
    """Names are taken without `prefix`, which AdapterHub leaves out where it saves a bare model."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._left: dict[str, Tensor] = {}
        # Numbers in the tensors that were taken.
        self.taken = 0
        require_one_form(tensors.keys(), prefix)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                message = f"{quoted(name)} has dtype {tensor.dtype}"
                raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")
            key = name.removeprefix(f"{prefix}.")
            self._left[name if key == LANGUAGE_HEAD else key] = tensor

    def take_any(self, name: str) -> Tensor | None:
        """A tensor of any shape that may be missing, as it is in the file."""
        tensor = self._left.pop(name, None)
        self.taken += 0 if tensor is None else tensor.numel()
        return tensor

    def take(self, name: str, *shape: int) -> Tensor:
        """In float32. Raises InvalidArgument where it is missing or mis-shaped."""
        if name not in self._left:
            message = f"the weights lack {name}, which the config asks for"
            raise InvalidArgument(message, reason="MISSING_TENSORS")
        tensor = self._left.pop(name)
        if tensor.shape != shape:
            raise FailedPrecondition(
                f"{name} has shape {tuple(tensor.shape)}; config and base model ask for {shape}",
                reason="BASE_MISMATCH",
            )
        self.taken += tensor.numel()
        return tensor.float()

    def drop_copies(self, copies: str, originals: str) -> None:
        """Forgets the tensors below `copies`, which are those below `originals` once more.

        Raises InvalidArgument (MALFORMED_WEIGHTS) where they differ.
        """
        for name in [name for name in self._left if name.startswith(f"{copies}.")]:
            original = self._left.get(originals + name.removeprefix(copies))
            if original is None or not torch.equal(original, self._left.pop(name)):
                raise InvalidArgument(
                    f"{quoted(name)} is no copy of what stands below {originals}",
                    reason="MALFORMED_WEIGHTS",
                )

    def require_none_left(self) -> None:
        """Raises InvalidArgument (EXTRA_TENSORS) if a tensor was not taken."""
        for name in self._left:
            raise _extra(name, "nothing that config and base model ask for")


def _extra(name: str, what: str) -> InvalidArgument:
    return InvalidArgument(f"{quoted(name)} is {what}", reason="EXTRA_TENSORS")
