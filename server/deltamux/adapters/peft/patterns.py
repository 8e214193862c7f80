"""Which modules a PEFT config means: its matching rules, run by RE2 so that no pattern can hang."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import re2

from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.errors import InvalidArgument

Value = TypeVar("Value")

ALL_LINEAR = "all-linear"

# Bytes and RE2 instructions: a match takes at most instructions times characters steps.
_MAX_MEMORY = 1 << 20
_MAX_PROGRAM = 20_000
_MAX_PROGRAMS = 200_000

# Where Python's `re`, which PEFT uses, and RE2 read the same text differently.
_AMBIGUOUS = ("[:", "{,")


class Pattern:
    """A regular expression of a config. Raises InvalidArgument (UNSUPPORTED_PATTERN)."""

    def __init__(self, text: str, template: str = "{}") -> None:
        if any(token in text for token in _AMBIGUOUS):
            raise _unsupported(text, "it reads differently outside Python")
        options = re2.Options()
        options.max_mem = _MAX_MEMORY
        options.log_errors = False
        try:
            self._regexp = re2.compile(template.replace("{}", text), options)
        except (re2.error, UnicodeEncodeError) as error:
            raise _unsupported(text, str(error)) from None
        self.size: int = self._regexp.programsize
        if self.size > _MAX_PROGRAM:
            raise _unsupported(text, "it is too large")

    def matches(self, name: str) -> bool:
        """Whether the whole of `name` matches."""
        return self._regexp.fullmatch(name) is not None

    def begins(self, name: str) -> bool:
        """Whether the start of `name` matches."""
        return self._regexp.match(name) is not None

    def index_in(self, name: str) -> tuple[bool, int | None]:
        """Whether the start of `name` matches, and the number that group "idx" captured."""
        match = self._regexp.match(name)
        index = match and match.groupdict()["idx"]
        return match is not None, None if index is None else int(index)


# How PEFT's tables mean modules: a key matches the end of a name.
ENDS = r"(.*\.)?({})$"
# As they meant them once: a whole name is none, and what stands in a key is not kept together.
ONCE_ENDS = r".*\.{}$"


class PatternTable(Generic[Value]):
    """PEFT's rank_pattern and alpha_pattern: the first key that matches a module's name counts.

    A key that is the whole name counts where none matches.
    """

    def __init__(self, values: Mapping[str, Value], template: str = ENDS) -> None:
        self._rules = [(Pattern(key, template), key, value) for key, value in values.items()]
        if sum(pattern.size for pattern, _, _ in self._rules) > _MAX_PROGRAMS:
            raise InvalidArgument("the patterns are too large", reason="UNSUPPORTED_PATTERN")

    def get(self, name: str, default: Value) -> Value:
        """The value for a module, or `default`."""
        for pattern, _, value in self._rules:
            if pattern.begins(name):
                return value
        for _, key, value in self._rules:
            if key == name:
                return value
        return default

    def idle_keys(self, names: Iterable[str]) -> list[str]:
        """Keys that mean none of `names`."""
        names = list(names)
        return [
            key
            for pattern, key, _ in self._rules
            if key not in names and not any(map(pattern.begins, names))
        ]


class LayerFilter:
    """PEFT's layers_to_transform and layers_pattern: only modules of the listed layers."""

    def __init__(self, layers: Iterable[int], patterns: Iterable[str]) -> None:
        self._layers = frozenset(layers)
        # Without a pattern, the first numbered part of a name is the layer.
        self._patterns = [Pattern(text, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.") for text in patterns]
        if not self._patterns:
            self._patterns = [Pattern("", r".*?\.[^.]*\.(?P<idx>\d+)\.{}")]

    def admits(self, name: str) -> bool:
        for pattern in self._patterns:
            found, index = pattern.index_in(name)
            if found:
                return index in self._layers
        return False


@dataclass(frozen=True, eq=False)
class Selector:
    """PEFT's target_modules, exclude_modules and layer filter in one.

    A tuple of names matches a module of that name or below any parent; a pattern matches whole
    names. `targets` None stands for "all-linear".
    """

    targets: tuple[str, ...] | Pattern | None
    excluded: tuple[str, ...] | Pattern = ()
    layers: LayerFilter | None = None

    def selects(self, name: str, is_hidden_linear: bool) -> bool:
        """`is_hidden_linear`: a linear module other than the language head."""
        if _names(self.excluded, name):
            return False
        if self.targets is None:
            return is_hidden_linear
        if isinstance(self.targets, tuple) and name in self.targets:
            return True
        return _names(self.targets, name) and (self.layers is None or self.layers.admits(name))


def _names(rule: tuple[str, ...] | Pattern, name: str) -> bool:
    if isinstance(rule, Pattern):
        return rule.matches(name)
    return any(name == key or name.endswith(f".{key}") for key in rule)


def _unsupported(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"the pattern {quoted(text)} is not served: {why}", reason="UNSUPPORTED_PATTERN"
    )
