"""The task head that PEFT saves beside an adapter of any family, as one of its modules_to_save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields
from deltamux.adapters.checkpoint.files import MODEL_CONFIG, WEIGHTS
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.tensors import require_finite
from deltamux.adapters.peft.head_config import SCORINGS, HeadConfig
from deltamux.adapters.peft.module_tensors import PREFIX
from deltamux.adapters.peft.saved_modules import MODULES_TO_SAVE, inside
from deltamux.adapters.primitives.task_head import HeadPlan, Layer, Scoring, TaskHead
from deltamux.adapters.task import Task, split_task
from deltamux.base.structure import Structure
from deltamux.base.task_heads import HeadModule, Level, TaskHeads
from deltamux.errors import FailedPrecondition, InvalidArgument

# PEFT asks for modules of these names wherever the task is a classification.
_ALWAYS_SAVED = ("classifier", "score")


@dataclass(frozen=True, eq=False)
class SavedHead:
    """What a checkpoint was trained for, its head, and what else it holds.

    The rest speaks of modules as if it had been trained for generation; a head of the vocabulary
    is no target where there was none.
    """

    task: Task
    head: TaskHead | None
    parameters: int
    manifest: Manifest
    tensors: Mapping[str, Tensor]
    structure: Structure


def take_task_head(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    structure: Structure,
    dtype: torch.dtype,
    head_config: Callable[[], HeadConfig],
) -> SavedHead:
    """Sets the task and its head apart; `head_config` reads what is said of a head elsewhere.

    Raises InvalidArgument where the head's tensors are missing or mis-shaped, FailedPrecondition
    for a task or a head that does not fit the base.
    """
    task, manifest = split_task(manifest)
    if manifest.task == "generation" and not structure.head:
        raise FailedPrecondition(
            "the adapter was trained to generate; the base model generates no text",
            reason="BASE_MISMATCH",
        )
    seen = _trained_model(structure, task)
    heads = structure.task_heads
    if task == "generation":
        return SavedHead(task, None, 0, manifest, tensors, seen)
    if task == "features":
        return SavedHead(task, None, 0, manifest, _inside_body(tensors, heads.body), seen)
    if task not in heads.formats:
        raise FailedPrecondition(
            f"the base model lacks the part that heads of the task {task} build on",
            reason="BASE_MISMATCH",
        )
    reader = _HeadReader(tensors, heads, dtype, head_config())
    head = reader.head(task)
    return SavedHead(
        task,
        head,
        sum(tensor.numel() for tensor in head.tensors),
        _without_head(manifest, reader.modules, structure),
        {name: tensor for name, tensor in tensors.items() if name not in reader.taken},
        seen,
    )


def _trained_model(structure: Structure, task: Task) -> Structure:
    """The base as a model of that task is built on it: with or without its own parts of heads."""
    pooled = [site.name for site in structure.sites.values() if site.pooled]
    absent = [name for name in pooled if not _has_part(structure.task_heads, task, name)]
    seen = structure.without(absent)
    return seen if task == "generation" else seen.headless()


def _has_part(heads: TaskHeads, task: Task, name: str) -> bool:
    if task == "generation":
        return False
    if task == "features":
        return name.startswith(f"{heads.body}.")
    form = heads.formats.get(task)
    return form is not None and form.shared


def _inside_body(tensors: Mapping[str, Tensor], body: str) -> dict[str, Tensor]:
    """Names of a model without a head, as they are inside one that has one."""
    return {
        f"{PREFIX}{body}.{name.removeprefix(PREFIX)}" if name.startswith(PREFIX) else name: tensor
        for name, tensor in tensors.items()
    }


def _without_head(manifest: Manifest, modules: Iterable[str], structure: Structure) -> Manifest:
    """modules_to_save with what else it names beside the head."""
    fields = dict(manifest.fields)
    names = Fields({MODULES_TO_SAVE: fields.pop(MODULES_TO_SAVE, None)}).take_names(MODULES_TO_SAVE)
    heads = (*modules, *_ALWAYS_SAVED)
    left = [
        name
        for name in names
        if not any(inside(module, name) for module in heads)
        or any(inside(site, name) for site in structure.sites)
    ]
    return replace(manifest, fields=fields | ({MODULES_TO_SAVE: list(left)} if left else {}))


class _HeadReader:
    """Takes the linear modules of a head, the last of which maps to the labels."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        heads: TaskHeads,
        dtype: torch.dtype,
        config: HeadConfig,
    ) -> None:
        # Names of the modules of the head, and of the tensors that belong to them.
        self.modules: list[str] = []
        self.taken: set[str] = set()
        self._tensors = tensors
        self._heads = heads
        self._dtype = dtype
        self._config = config

    def head(self, level: Level) -> TaskHead:
        heads, config = self._heads, self._config
        form = heads.formats[level]
        parts = [self._module(module) for module in form.modules]
        count = parts[-1].weight.shape[0]
        for part in parts[:-1]:
            self._require_width(part.weight.shape[0], part)
        plan = HeadPlan(
            form.pooling,
            heads.pad_token_id if config.pad_token_id is None else config.pad_token_id,
            form.shared,
            tuple(
                Layer(part.weight.shape[0], module.biased, module.activation)
                for module, part in zip(form.modules, parts, strict=True)
            ),
            _labels(heads, config, count),
            _scoring(heads, config, count),
        )
        biases = tuple(part.bias for part in parts if part.bias is not None)
        return TaskHead(plan, tuple(part.weight for part in parts), biases)

    def _module(self, module: HeadModule) -> _Linear:
        found = (name for name in module.names if f"{PREFIX}{name}.weight" in self._tensors)
        name = next(found, module.names[0])
        weight = self._take(f"{PREFIX}{name}.weight", 2)
        bias = self._take(f"{PREFIX}{name}.bias", 1) if module.biased else None
        if bias is not None and len(bias) != len(weight):
            raise InvalidArgument(
                f"{name} has {len(weight)} rows and a bias of {len(bias)}", reason="SHAPE_MISMATCH"
            )
        self.modules.append(name)
        linear = _Linear(name, weight, bias)
        self._require_width(weight.shape[1], linear)
        return linear

    def _take(self, name: str, dimensions: int) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            message = f"{WEIGHTS} lacks {name}, which belongs to the task head"
            raise InvalidArgument(message, reason="MISSING_TENSORS")
        if not tensor.is_floating_point():
            message = f"{WEIGHTS}: {name} has dtype {tensor.dtype}"
            raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")
        if tensor.ndim != dimensions:
            message = f"{name} has {tensor.ndim} dimensions, not {dimensions}"
            raise InvalidArgument(message, reason="SHAPE_MISMATCH")
        self.taken.add(name)
        served = tensor.to(self._dtype).contiguous()
        require_finite(f"{name}, in {self._dtype},", served)
        return served

    def _require_width(self, features: int, linear: _Linear) -> None:
        if features != self._heads.width:
            raise FailedPrecondition(
                f"{linear.name}: weight of {tuple(linear.weight.shape)} does not fit the base "
                f"model's hidden states, which are {self._heads.width} wide",
                reason="BASE_MISMATCH",
            )


@dataclass(frozen=True, eq=False)
class _Linear:
    name: str
    weight: Tensor
    bias: Tensor | None


def _labels(heads: TaskHeads, config: HeadConfig, count: int) -> tuple[str, ...]:
    """The head's own, those of the base's config where it has as many, or as transformers names
    them."""
    if config.labels is not None and len(config.labels) != count:
        raise InvalidArgument(
            f"{MODEL_CONFIG} names {len(config.labels)} labels; the task head has {count} outputs",
            reason="BAD_FIELD",
            field="id2label",
        )
    unnamed = tuple(f"LABEL_{number}" for number in range(count))
    return config.labels or (heads.labels if len(heads.labels) == count else unnamed)


def _scoring(heads: TaskHeads, config: HeadConfig, count: int) -> Scoring:
    """As transformers' pipelines decide it; one output without a problem type is a regression."""
    if config.scoring is not None:
        return config.scoring
    if len(heads.labels) == count and heads.problem_type is not None:
        return SCORINGS[heads.problem_type]
    return "softmax" if count > 1 else "none"
