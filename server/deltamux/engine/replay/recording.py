"""The operations of a step on a CPU, kept to be done again in the memory that they used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deltamux.engine.replay.scratch import Scratch
from deltamux_kernels import native

# Those that tell the host something of a tensor's numbers, by which it may decide, random ones, and
# those that turn around the tensors which others were given before.
_REFUSED = {
    torch.Tag.inplace_view,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
# The same, but no operations of torch.
_READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_UNFILLED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class CannotRecord(Exception):
    """An operation that may have to be another one the next time, or needs more memory."""


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what torch and the C code compute in `record`, each result in `scratch`.

    `replay` computes the same of what stands in the memory of what was given then. Views cost
    nothing any more, nor does finding out which operations there are.
    """

    def __init__(self, scratch: Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[native.Call] = []
        self._scratch = scratch

    @contextmanager
    def record(self) -> Iterator[None]:
        """Raises CannotRecord at an operation that cannot simply be done again."""
        self._scratch.restart()
        with _NoReading(), self, native.recording(self.calls):
            yield
        self.calls = native.joined(native.fetching_ahead(self.calls))

    def replay(self) -> None:
        for call in self.calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:  # the operations that it is made of are seen by themselves
                return func.decompose(*args, **kwargs)
        if not _can_repeat(func, args):
            raise CannotRecord(str(func))
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        if func._schema.is_mutable:
            self.calls.append(partial(func, *args, **kwargs))
            return out
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))} - {None}
        if all(_memory(tensor) in given for tensor in _tensors(out)):
            return out
        kept = _mapped(out, lambda new: new if _memory(new) in given else self._keep(new))
        if func.overloadpacket.__name__ not in _UNFILLED:
            self.calls.append(_again(func, args, kwargs, kept))
        return kept

    def _keep(self, new: Tensor) -> Tensor:
        """The same numbers, where they stay."""
        if new.layout is not torch.strided:
            raise CannotRecord(f"a result that is {new.layout}")
        kept = self._scratch.like(new)
        if kept is None:
            raise CannotRecord("a step that needs more memory than there is for it")
        return kept.copy_(new)


class _NoReading(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            raise CannotRecord(func.__name__)
        return func(*args, **(kwargs or {}))


@cache
def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _can_repeat(func: Any, args: Any) -> bool:
    name = func.overloadpacket.__name__
    if name == "lift_fresh":
        return False  # a tensor of the host's own numbers
    if name == "index":
        return all(places is None or places.dtype != torch.bool for places in args[1])
    return _REFUSED.isdisjoint(func.tags)


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> native.Call:
    """Does an operation again, with its result in the memory of `out`."""
    into = _into(func)
    if into is not None and isinstance(out, Tensor):
        return partial(into, *args, **kwargs, out=out)

    def repeat() -> None:
        for kept, value in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
            kept.copy_(value)

    return repeat


@cache
def _into(func: Any) -> Callable[..., Tensor] | None:
    """The form of an operation that is given the memory of its one result."""
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    packet = func.overloadpacket
    for form in (getattr(packet, name) for name in packet.overloads()):
        arguments = form._schema.arguments
        given = [(argument.name, str(argument.type)) for argument in arguments]
        if given == [*wanted, ("out", "Tensor")] and arguments[-1].is_out:
            found: Callable[..., Tensor] = form
            return found
    return None


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for part in tree for tensor in _tensors(part)]


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """With `change` of each tensor in its place."""
    if isinstance(tree, tuple | list):
        return type(tree)([_mapped(part, change) for part in tree])
    return change(tree) if isinstance(tree, Tensor) else tree


def _memory(tensor: Tensor) -> int | None:
    """Where it lies; None of one that does not lie in one piece."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None
