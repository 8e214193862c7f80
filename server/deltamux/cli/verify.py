"""`deltamux verify`: does an adapter answer here as in the library that trained it?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic_settings import CliPositionalArg
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from deltamux.cli.command import Device, option
from deltamux.cli.tables import Report, print_facts, print_json, progress_bar
from deltamux.extract.samples import sample_texts
from deltamux.verify.interpreter import Interpreter
from deltamux.verify.run import Verification, verify


class Verify(Report):
    """Run an adapter in the engine's mixed batch and alone in the library that trained it, and
    compare; exit 0 when they agree, 1 when not."""

    adapter: CliPositionalArg[Path] = option(help="the adapter's folder")
    model: str = option(help="the base model, a folder or a hub id", metavar="MODEL")
    prompts: Path | None = option(
        None, help="prompts, one a line; our own when absent", metavar="FILE"
    )
    tolerance: float = option(
        1e-4, gt=0, help="largest difference of a logit, or in an embedding", metavar="X"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", help="to compute in")
    device: Device = option("auto", help="cpu, cuda, cuda:N or auto", metavar="DEVICE")
    reference_python: str | None = option(
        None, help="the Python that has the adapter's library, where deltamux's own has not: "
        "AdapterHub's needs an environment of its own", metavar="PYTHON",
    )  # fmt: skip
    reference_timeout: float = option(600, gt=0, help="seconds that it may take", metavar="SECONDS")


def main(arguments: Sequence[str]) -> int:
    options = Verify.parse("deltamux verify", arguments)
    disable_progress_bar()
    # The library fills in the head that a model loaded for it lacks at first.
    set_verbosity_error()
    texts = sample_texts(options.prompts)
    with progress_bar("running both"):
        found = verify(
            options.adapter,
            options.model,
            texts,
            options.device,
            options.dtype,
            _elsewhere(options),
        )
    agrees = found.within(options.tolerance)
    if options.as_json:
        print_json(found.as_json() | {"tolerance": options.tolerance, "agrees": agrees})
    else:
        _show(found, options.tolerance, agrees)
    return 0 if agrees else 1


def _elsewhere(options: Verify) -> Interpreter | None:
    if options.reference_python is None:
        return None
    return Interpreter(options.reference_python, options.reference_timeout)


def _show(found: Verification, tolerance: float, agrees: bool) -> None:
    adapters, bases = found.compared
    moved = "" if found.effect is None else f", which the adapter moves by up to {found.effect:.2g}"
    same = "" if found.same_choice is None else f"{found.same_choice:.1%} of the tokens"
    print_facts(
        {
            "compared": f"{found.tokens} tokens of {found.prompts} prompts, with {found.library}",
            "adapter": f"{adapters} differ by {found.largest:.1e} at most{moved}",
            "base rows": f"{bases} differ by {found.base_largest:.1e} at most",
            "greedy": same and f"the same next token after {same}",
            "verdict": f"{'equal' if agrees else 'not equal'} within {tolerance:.0e}",
        }
    )
