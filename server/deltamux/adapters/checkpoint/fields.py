"""Typed reading of a config: every field is taken by name, and what is left over is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.errors import FailedPrecondition, InvalidArgument


class Fields:
    """The fields of an adapter_config.json that have not been taken yet.

    A field that is missing has its default; null is a value, of what is off or not said. Every
    `take` raises InvalidArgument (BAD_FIELD) for a value of another type or out of range.
    """

    def __init__(self, values: Mapping[str, Json]) -> None:
        self._left = dict(values)

    def take(self, name: str, default: Json = None) -> Json:
        """The value whatever its type, or the default."""
        return self._left.pop(name, default)

    def take_bool(self, name: str, default: bool = False) -> bool:
        """Null is false, as it is to the libraries, whatever the default."""
        value = self.take(name, default)
        if value is None:
            return False
        return value if isinstance(value, bool) else refuse_field(name, value, "true or false")

    def take_names(self, name: str) -> tuple[str, ...]:
        """A list of strings, or one for a list of one; () where it is missing or empty."""
        value = self.take(name)
        if value in (None, ""):
            return ()
        names = value if isinstance(value, list) else [value]
        return tuple(
            n if isinstance(n, str) and n else refuse_field(name, n, "a module name") for n in names
        )

    def take_table(self, name: str) -> Mapping[str, Json]:
        """An object; empty where it is missing."""
        value = self.take(name)
        if value is None:
            return {}
        return value if isinstance(value, dict) else refuse_field(name, value, "an object")

    def discard(self, names: Iterable[str]) -> None:
        """Forgets fields that do not change what the adapter computes."""
        for name in names:
            self._left.pop(name, None)

    def require_off(self, defaults: Mapping[str, Json]) -> None:
        """Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a feature that is asked for."""
        for name, off in defaults.items():
            value = self.take(name)
            if value not in (None, False, off, [], {}):
                raise unsupported(f"{name} = {quoted(value)}")

    def require_none_left(self) -> None:
        """Raises FailedPrecondition (UNKNOWN_FIELD) for a field that nobody took and that says
        something."""
        for name, value in self._left.items():
            if value is None:
                continue
            raise FailedPrecondition(
                f"{CONFIG}: {quoted(name)} = {quoted(value)} is not understood; "
                "remove it only if it does not change what the adapter computes",
                reason="UNKNOWN_FIELD",
                field=name[:120],
            )


def as_integer(name: str, value: Json, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        refuse_field(name, value, f"an integer from {low} to {high}")
    return value


def as_number(name: str, value: Json, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
        refuse_field(name, value, f"a number above 0, at most {high:g}")
    return float(value)


def refuse_field(name: str, value: Json, wanted: str) -> NoReturn:
    """Raises InvalidArgument (BAD_FIELD)."""
    message = f"{CONFIG}: {name} is {quoted(value)}; it must be {wanted}"
    raise InvalidArgument(message, reason="BAD_FIELD", field=name)


def unsupported(feature: str) -> FailedPrecondition:
    """The refusal of something that a library knows and this server does not serve."""
    return FailedPrecondition(f"{CONFIG}: {feature} is not served", reason="UNSUPPORTED_FEATURE")
