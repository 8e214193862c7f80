"""Options of a command: one pydantic-settings class each, from flags, then the environment."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
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
        source = CliSettingsSource[Any](
            cls,
            root_parser=_Parser(cls, program),
            add_argument_method=_Parser.add_field,
        )
        try:
            return CliApp.run(cls, cli_args=list(arguments), cli_settings_source=source)
        except ValidationError as error:
            raise UsageError(f"{program}: {_first_problem(error)}") from None
        except SettingsError as error:
            raise UsageError(f"{program}: {_unreadable(cls, str(error))}") from None


def option(default: Any = ..., *, help: str, metavar: str = "", **constraints: Any) -> Any:
    """A field of a Command: what --help says of it, and the word for its value."""
    # The word travels in front of the help text; `add_field` takes it off again.
    return Field(default, description=f"{metavar}|{help}", **constraints)


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
        self._titles = command.sections
        self._section: argparse._ActionsContainer = self

    def add_field(self, *names: str, **settings: Any) -> argparse.Action:
        """What pydantic-settings calls for every field, in their order."""
        if title := self._titles.get(settings.get("dest", names[0])):
            self._section = self.add_argument_group(title)
        metavar, _, text = settings["help"].partition("|")
        # What pydantic-settings says of a default that is no value.
        settings["help"] = re.sub(r" *\(default(: |: None| factory: \w+)\)", "", text)
        if metavar:
            settings["metavar"] = metavar
        if len(names) > 1:
            # A shortcut is there because the field could not be called so itself.
            names = names[1:]
        container = self._section if names[0].startswith("-") else self
        return container.add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown[1].partition("=")[0]
            kind = "option" if flag.startswith("-") else "argument"
            message = f"unknown {kind} {flag}{nearest(flag, self._option_string_actions)}"
        raise UsageError(f"{self.prog}: {message}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]).replace("_", "-") if problem["loc"] else ""
    if problem["type"] == "missing":
        return f"--{name} is required"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"--{name} {problem['input']}: {message}" if name else message


def _unreadable(command: type[Command], message: str) -> str:
    """A value that is not of its option's form, NAME=PATH for one."""
    if not (field := re.match(r"Parsing error encountered for (\w+)", message)):
        return message
    wanted = (command.model_fields[field[1]].description or "").partition("|")[0]
    return f"--{field[1].replace('_', '-')}: expected {wanted}"
