"""A model with an own checkpoint written into its weights, densely, by transformers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltamux.adapters.checkpoint import delta_format as words
from deltamux.adapters.checkpoint.tensors import read_tensors
from deltamux.errors import InvalidArgument
from deltamux.extract.forms import change


def reconstruct(model: PreTrainedModel, folder: Path) -> None:
    """Changes the weights of `model`, in place, to what the adapter in `folder` makes of them.

    Raises InvalidArgument for parts that are none of the format's or belong to no parameter.
    """
    changed: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in read_tensors(folder).items():
        parameter, part = _split(name)
        changed[parameter][part] = tensor
    with torch.no_grad():
        for parameter in changed:
            _untie(model, parameter)
        for parameter, parts in changed.items():
            _apply(model, parameter, parts)


def _split(name: str) -> tuple[str, str]:
    for part in words.PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    raise InvalidArgument(f"{name} is no part of an adapter of type {words.TYPE}")


def _untie(model: PreTrainedModel, parameter: str) -> None:
    """Gives a head with parts of its own a copy of the weight that it shares with embeddings."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    module, _, name = parameter.rpartition(".")
    if model.get_submodule(module) is head and name == "weight" and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)


def _apply(model: PreTrainedModel, parameter: str, parts: Mapping[str, Tensor]) -> None:
    module_name, _, name = parameter.rpartition(".")
    module = model.get_submodule(module_name)
    target = getattr(module, name, None)
    if target is None and name == "bias" and isinstance(module, nn.Linear):
        module.bias = nn.Parameter(parts[words.VALUE].to(module.weight), requires_grad=False)
        return
    if not isinstance(target, Tensor):
        raise InvalidArgument(f"the model has no parameter {parameter}")
    matrix = target.T if isinstance(module, Conv1D) and name == "weight" else target
    if words.VALUE in parts:
        matrix.copy_(parts[words.VALUE])
    elif words.ROW_IDS in parts:
        matrix[parts[words.ROW_IDS].long()] = parts[words.ROW_VALUES].to(matrix)
    elif parts.keys() != {words.SAMPLE}:
        matrix.add_(change(parts, matrix.shape).to(matrix))
