"""Options of a command: one pydantic-settings class each, from flags, then the environment."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NoReturn, Self

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    SettingsConfigDict,
    SettingsError,
)


class UsageError(Exception):
    """The command line is wrong; the message is one line for the person who typed it."""


class Command(BaseSettings):
    """Base of the options of every command; the docstring of a subclass heads its --help."""

    model_config = SettingsConfigDict(
        env_prefix="DELTAMUX_",
        env_prefix_target="all",
        env_ignore_empty=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
    )

    # The first field of each section of --help, and its title.
    sections: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, program: str, arguments: Sequence[str]) -> Self:
        """Reads flags and environment; raises UsageError, exits after printing --help."""
        parser = _Parser(cls, program)
        try:
            source = CliSettingsSource[Any](
                cls,
                cli_parse_args=list(arguments),
                root_parser=parser,
                add_argument_method=_Parser.add_field,
            )
            given: dict[str, Any] = {"_cli_settings_source": source, **parser.repeated}
            return cls(**given)
        except ValidationError as error:
            raise UsageError(f"{program}: {_first_problem(cls, error, arguments)}") from None
        except SettingsError as error:
            raise UsageError(f"{program}: {_unreadable(cls, str(error))}") from None


def option(default: Any = ..., *, help: str, metavar: str = "", **constraints: Any) -> Any:
    """A field of a Command: what --help says of it, and the word for its value."""
    # The word travels in front of the help text; `add_field` takes it off again.
    return Field(default, description=f"{metavar}|{help}", **constraints)


def _device(word: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", word):
        raise ValueError("expected cpu, cuda, cuda:N or auto")
    return word


Device = Annotated[str, AfterValidator(_device)]


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" for a word close to a known one, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


class _Help(argparse.HelpFormatter):
    """Wide enough for a flag and its explanation on one line; usage names no options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        words = "".join(f" {a.metavar or a.dest}" for a in actions if not a.option_strings)
        super().add_usage(f"{self._prog} [options]{words}", actions, groups, prefix)


class _Parser(argparse.ArgumentParser):
    """argparse with sections, and with errors of one line that name the nearest flag."""

    def __init__(self, command: type[Command], program: str) -> None:
        super().__init__(
            prog=program, description=command.__doc__, allow_abbrev=False, formatter_class=_Help
        )
        self._fields = command.model_fields
        self._titles = command.sections
        self._section: argparse._ActionsContainer = self
        # The values of repeatable options, by field.
        self.repeated: dict[str, Any] = {}

    def add_field(self, *names: str, **settings: Any) -> argparse.Action:
        """What pydantic-settings calls for every field, in their order."""
        if title := self._titles.get(settings.get("dest", names[0])):
            self._section = self.add_argument_group(title)
        metavar, _, text = settings["help"].partition("|")
        # What pydantic-settings says of a default that is no value, or goes without saying.
        settings["help"] = re.sub(
            r" *\(default(: |: None|: False|: \[.*\]| factory: \w+)\)", "", text
        )
        if metavar:
            settings["metavar"] = metavar
        if settings.get("action") == "append":
            settings["action"] = _Named if "=" in metavar else _Repeated
        elif "dest" in settings and "action" not in settings:
            empty = self._fields[settings["dest"]].default == ""
            settings["type"] = str if empty else _filled
        container = self._section if names[0].startswith("-") else self
        return container.add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown[1].partition("=")[0]
            kind = "option" if flag.startswith("-") else "argument"
            message = f"unknown {kind} {flag}{nearest(flag, self._option_string_actions)}"
        raise UsageError(f"{self.prog}: {message.removeprefix('argument ')}")


def _filled(word: str) -> str:
    """Refuses what an unset variable of a shell leaves; it would pass for no flag at all."""
    if not word:
        raise argparse.ArgumentTypeError("the value is empty")
    return word


class _Repeated(argparse.Action):
    """Keeps every word as it stands; pydantic-settings would look for commas and JSON in it."""

    def __call__(self, parser: Any, namespace: Any, word: Any, flag: str | None = None) -> None:
        parser.repeated.setdefault(self.dest, []).append(word)


class _Named(argparse.Action):
    """NAME=VALUE; refuses a word without either, and a name that was given before."""

    def __call__(self, parser: Any, namespace: Any, word: Any, flag: str | None = None) -> None:
        named = parser.repeated.setdefault(self.dest, {})
        name, _, value = word.partition("=")
        if not (name and value):
            parser.error(f"{flag} {word}: expected {self.metavar}")
        if name in named:
            parser.error(f"{flag} {word}: {name} is given twice")
        named[name] = value


# What is wrong with JSON of the environment that parses: flags are words.
_NOT_OF_WORDS = ("dict_type", "list_type", "path_type", "string_type")


def _first_problem(command: type[Command], error: ValidationError, arguments: Sequence[str]) -> str:
    problem = error.errors(include_url=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else ""
    flag = f"--{field.replace('_', '-')}"
    if problem["type"] == "missing":
        # Only what stands without a flag is required and has no word for its value.
        return f"{flag if _word(command, field) else field.upper()} is required"
    if problem["type"] in _NOT_OF_WORDS:
        return _expected_json(command, field)
    flags = {word.partition("=")[0] for word in arguments}
    name = flag if flag in flags else f"DELTAMUX_{field.upper()}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"].startswith("byte_size"):
        message = "expected a size: 4GiB, 500MB or a number of bytes"
    message = message[:1].lower() + message[1:]
    return f"{name} {problem['input']}: {message}" if field else message


def _unreadable(command: type[Command], message: str) -> str:
    """A value of the environment that is no JSON: those of a flag were looked at before."""
    if not (field := re.search(r'for field "(\w+)"', message)):
        return message
    return _expected_json(command, field[1])


def _expected_json(command: type[Command], field: str) -> str:
    word = _word(command, field)
    name, _, value = word.partition("=")
    form = f'{{"{name}": "{value}"}}' if value else f'["{word}"]'
    return f"DELTAMUX_{field.upper()}: expected JSON, {form}"


def _word(command: type[Command], field: str) -> str:
    """What stands for the value of this option in its --help."""
    return (command.model_fields[field].description or "").partition("|")[0]
