"""What PEFT saves of a module that was trained whole, beside its tensors, and does not read.

Where it saves all biases, or embedding and head, it saves those of such a module once more, and
those that it had before training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.adapters.payloads.base_fit import differs, is_copy
from deltamux.adapters.peft.module_tensors import PREFIX
from deltamux.base.structure import Structure
from deltamux.errors import InvalidArgument

_COPY = re.compile(r"(.+)\.(modules_to_save|original_module)\.(weight|bias)")


def without_second_copies(tensors: Mapping[str, Tensor], structure: Structure) -> dict[str, Tensor]:
    """The other tensors, after making sure of the copies.

    The rows of added tokens, and a task head, are not the base's: nothing says what they were.
    Raises InvalidArgument (EXTRA_TENSORS) where what was trained is there twice and not the same,
    FailedPrecondition (UNSUPPORTED_FEATURE) where what it was is not the base's own.
    """
    left = dict(tensors)
    for name, copy in tensors.items():
        found = _COPY.fullmatch(name)
        if found is None or f"{found[1]}.{found[3]}" not in tensors:
            continue
        module, kind, part = found.groups()
        if kind == "original_module":
            _require_base(name, copy, module.removeprefix(PREFIX), part, structure)
        elif not torch.equal(copy, tensors[f"{module}.{part}"]):
            message = f"{WEIGHTS}: {quoted(name)} and {quoted(f'{module}.{part}')} differ"
            raise InvalidArgument(message, reason="EXTRA_TENSORS")
        del left[name]
    return left


def _require_base(name: str, copy: Tensor, module: str, part: str, structure: Structure) -> None:
    if module not in structure.sites:
        return
    base = structure.weight(module) if part == "weight" else structure.bias(module)
    if base is not None and structure.sites[module].conv1d and part == "weight":
        base = base.T
    if base is None or copy.ndim != base.ndim:
        raise differs(name)
    rows = min(len(copy), len(base))
    if not is_copy(copy[:rows], base[:rows]):
        raise differs(name)
