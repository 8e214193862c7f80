"""JSON read without leniency: no duplicates, no NaN, no huge numbers, no deep nesting, no text that
is not Unicode."""

from __future__ import annotations

import json
import math
from collections import Counter

from deltamux.errors import InvalidArgument

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_MAX_DEPTH = 16
_MAX_DIGITS = 18
_NESTS = (list, dict)


def parse_object(data: bytes, subject: str) -> dict[str, Json]:
    """The JSON object in `data`. Raises InvalidArgument, which names `subject`."""
    try:
        value: Json = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        _check_depth(value, _MAX_DEPTH)
        if b"\\u" in data:
            _check_text(value)
    except RecursionError:
        raise _malformed(subject, "it is nested too deeply") from None
    except ValueError as error:
        raise _malformed(subject, str(error)) from None
    if not isinstance(value, dict):
        raise _malformed(subject, "it is not an object")
    return value


def quoted(name: object) -> str:
    """`name` as it may stand in an error: escaped, and cut where it is long."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _malformed(subject: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{subject} is not strict JSON: {why}", reason="MALFORMED_JSON")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {quoted(twice)} occurs twice")
    return result


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {quoted(text)} is too large")
    return value


def _bounded(text: str) -> int:
    if len(text) > _MAX_DIGITS and len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"integer {quoted(text)} is too large")
    return int(text)


def _check_text(value: Json) -> None:
    """Raises ValueError for half of a surrogate pair, which no message could carry to a client."""
    json.dumps(value, ensure_ascii=False).encode()


def _check_depth(value: Json, levels: int) -> None:
    """Raises ValueError for a value inside `levels` lists and objects. Most values are in few."""
    if not isinstance(value, _NESTS):
        return
    if value and levels == 1:
        raise ValueError("it is nested too deeply")
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, _NESTS):
            _check_depth(child, levels - 1)
