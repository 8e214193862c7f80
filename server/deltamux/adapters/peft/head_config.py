"""What config.json beside an adapter says of its task head: labels, problem type, padding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltamux.adapters.checkpoint.files import MODEL_CONFIG, open_model_config
from deltamux.adapters.checkpoint.strict_json import Json, parse_object, quoted
from deltamux.adapters.primitives.task_head import Scoring
from deltamux.errors import InvalidArgument

_MAX_BYTES = 1 << 20
_MAX_LABEL = 1000

# transformers' problem types.
SCORINGS: dict[str, Scoring] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


@dataclass(frozen=True)
class HeadConfig:
    """What is None is not said; all other fields of the file are the model's."""

    labels: tuple[str, ...] | None = None
    scoring: Scoring | None = None
    pad_token_id: int | None = None


def read_head_config(folder: Path) -> HeadConfig:
    """Raises InvalidArgument for a file that is there and malformed."""
    try:
        file = open_model_config(folder)
    except FileNotFoundError:
        return HeadConfig()
    with file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        message = f"{MODEL_CONFIG} has more than {_MAX_BYTES} bytes"
        raise InvalidArgument(message, reason="TOO_LARGE")
    fields = parse_object(data, MODEL_CONFIG)
    return HeadConfig(
        _labels(fields.get("id2label")),
        _scoring(fields.get("problem_type")),
        _pad_token_id(fields.get("pad_token_id")),
    )


def _labels(names: Json) -> tuple[str, ...] | None:
    """From {"0": "ham", "1": "spam"}."""
    if names is None:
        return None
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(names))}:
        raise _bad("id2label", names, "labels by the numbers from 0 on")
    labels = [names[str(index)] for index in range(len(names))]
    if not all(isinstance(label, str) and 0 < len(label) <= _MAX_LABEL for label in labels):
        raise _bad("id2label", names, f"labels of 1 to {_MAX_LABEL} characters")
    return tuple(str(label) for label in labels)


def _scoring(problem: Json) -> Scoring | None:
    if problem is None:
        return None
    if not isinstance(problem, str) or problem not in SCORINGS:
        raise _bad("problem_type", problem, f"one of {', '.join(SCORINGS)}")
    return SCORINGS[problem]


def _pad_token_id(value: Json) -> int | None:
    if value is not None and type(value) is not int:
        raise _bad("pad_token_id", value, "a token")
    return value


def _bad(name: str, value: Json, wanted: str) -> InvalidArgument:
    message = f"{MODEL_CONFIG}: {name} is {quoted(value)}; it must be {wanted}"
    return InvalidArgument(message, reason="BAD_FIELD", field=name)
