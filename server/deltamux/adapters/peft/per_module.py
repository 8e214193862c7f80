"""Ranks and scales: a number of the config and a table that says otherwise of some modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from deltamux.adapters.checkpoint.fields import Fields, as_integer, as_number
from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.adapters.peft.patterns import ENDS, PatternTable
from deltamux.errors import FailedPrecondition, InvalidArgument

Number = TypeVar("Number", int, float)

MAX_RANK = 4096

_MAX_COUNT = (1 << 31) - 1
_MAX_SCALE = 1e6


class PerModule(Generic[Number]):
    """`default`, except where a key of `table` ends a module's name; `field` names the table."""

    def __init__(self, default: Number, field: str, table: PatternTable[Number]) -> None:
        self.default: Number = default
        self._field = field
        self._table: PatternTable[Number] = table

    def of(self, module: str) -> Number:
        return self._table.get(module, self.default)

    def require_used(self, modules: Iterable[str]) -> None:
        """Raises InvalidArgument (BAD_FIELD) for a key that ends the name of none of `modules`."""
        if idle := self._table.idle_keys(modules):
            message = f"{self._field} names {idle[0]!r:.120}, which matches no targeted module"
            raise InvalidArgument(message, reason="BAD_FIELD", field=self._field)


def read_ranks(fields: Fields) -> PerModule[int]:
    """Takes r and rank_pattern."""
    return _read(fields, "r", "rank_pattern", as_rank)


def read_scales(fields: Fields, name: str, table: str = "alpha_pattern") -> PerModule[float]:
    """Takes the field `name`, a number above 0, and the table of its exceptions."""
    return _read(fields, name, table, as_scale)


def read_frequencies(fields: Fields, template: str = ENDS) -> PerModule[int]:
    """Takes n_frequency and n_frequency_pattern, whose keys are put into the template."""
    return _read(fields, "n_frequency", "n_frequency_pattern", as_count, template)


def as_count(name: str, value: Json) -> int:
    return as_integer(name, value, 1, _MAX_COUNT)


def as_rank(name: str, value: Json) -> int:
    """Raises FailedPrecondition (RANK_TOO_LARGE) above MAX_RANK."""
    rank = as_count(name, value)
    require_served_rank(f"{CONFIG}: {name}", rank)
    return rank


def as_scale(name: str, value: Json) -> float:
    return as_number(name, value, _MAX_SCALE)


def require_served_rank(subject: str, rank: int) -> None:
    """Raises FailedPrecondition (RANK_TOO_LARGE) above MAX_RANK."""
    if rank > MAX_RANK:
        raise FailedPrecondition(
            f"{subject} is {rank}; this server serves ranks up to {MAX_RANK}",
            reason="RANK_TOO_LARGE",
        )


def _read(
    fields: Fields,
    name: str,
    table: str,
    read: Callable[[str, Json], Number],
    template: str = ENDS,
) -> PerModule[Number]:
    values = {
        key: read(f"{table}[{quoted(key)}]", value)
        for key, value in fields.take_table(table).items()
    }
    return PerModule(read(name, fields.take(name)), table, PatternTable(values, template))
