"""How commands print: tables or JSON, as --json says, and a bar while they work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ByteSize
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from deltamux.cli.command import Command, option

# A file or a pipe has no width to keep to.
_UNFOLDED = 10_000


class Report(Command):
    """Options of a command that ends in a report."""

    # `json` itself is a method of every model of pydantic.
    as_json: bool = option(False, help="print JSON in place of tables", validation_alias="json")


def print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is words and whose other columns are figures."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_facts(facts: dict[str, str]) -> None:
    """Name and value, one a line; what has no value is left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(name, value)
    console().print(table)


def console() -> Console:
    """Prints what it is given, which may look like rich's markup, and folds for terminals only."""
    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _UNFOLDED
    return made


def in_words(size: int) -> str:
    """Bytes as a person reads them."""
    return ByteSize(size).human_readable()


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function to tell (done, of, what is next); shown on standard error if it is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)

        def tell(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{title} {name}")

        yield tell
