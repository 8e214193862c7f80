"""What a model was trained for with an adapter, and what it can therefore be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.errors import FailedPrecondition

# Of the last hidden states: the language head, a task head for sequences or for tokens, or none.
Task = Literal["generation", "sequence", "token", "features"]
# The call of the inference service.
Call = Literal["Generate", "Classify", "Embed"]

_TASKS: Mapping[str, Task] = {
    "CAUSAL_LM": "generation",
    "SEQ_CLS": "sequence",
    "TOKEN_CLS": "token",
    "FEATURE_EXTRACTION": "features",
}
# How transformers' names of classes end, in the order in which they are to be looked at.
_CLASSES: Mapping[str, Task] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "LMHeadModel": "generation",
    "Model": "features",
}


def split_task(manifest: Manifest) -> tuple[Task, Manifest]:
    """The task, and the manifest without it.

    Where PEFT was given none, it has written down the class of the model. Raises
    FailedPrecondition (UNSUPPORTED_FEATURE) for the task of another kind of model.
    """
    if manifest.library != "peft":
        return "generation", manifest
    fields = dict(manifest.fields)
    task = fields.pop("task_type", None)
    if task is None:
        return _task_of_class(fields.get("auto_mapping")), replace(manifest, fields=fields)
    if not isinstance(task, str) or task not in _TASKS:
        raise unsupported(f"task_type = {quoted(task)}")
    return _TASKS[task], replace(manifest, fields=fields, task=_TASKS[task])


def require_fit(task: str, call: Call) -> None:
    """Raises FailedPrecondition for a call that an adapter of this task cannot answer."""
    if call == "Generate" and task != "generation":
        raise FailedPrecondition(
            f"the adapter was trained for another task ({task}); it generates no text",
            reason="NO_GENERATION",
        )
    if call == "Classify" and task not in ("sequence", "token"):
        raise FailedPrecondition("the adapter has no task head", reason="NO_TASK_HEAD")


def _task_of_class(mapping: Json) -> Task:
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    ends = (task for end, task in _CLASSES.items() if isinstance(name, str) and name.endswith(end))
    return next(ends, "generation")
