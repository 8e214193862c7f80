"""`deltamux extract`: what a fine-tune changed of its base, as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from transformers.utils.logging import disable_progress_bar

from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS
from deltamux.cli.command import UsageError, option
from deltamux.cli.tables import (
    Report,
    in_words,
    print_facts,
    print_json,
    print_table,
    progress_bar,
)
from deltamux.extract.forms import Form, FormName
from deltamux.extract.logits import logit_difference
from deltamux.extract.report import Extraction
from deltamux.extract.run import extract
from deltamux.extract.samples import sample_texts
from deltamux.extract.source import local_folder

PROGRAM = "deltamux extract"

# The options of one form, which would say nothing to another.
_FORM_OF = {"rank": "low-rank", "energy": "low-rank", "share": "sparse"}


class Extract(Report):
    """Take what a fine-tune changed out of two checkpoints, and write it as an adapter."""

    sections: ClassVar[dict[str, str]] = {
        "base": "the two checkpoints",
        "form": "how changed matrices of linear layers are stored; all else is stored exactly",
        "logits": "what is reported",
    }

    base: str = option(help="the base model, a folder or a hub id", metavar="MODEL")
    tuned: str = option(help="the fine-tune of it, a folder or a hub id", metavar="MODEL")
    out: Path = option(help="the adapter's folder, made where it is missing", metavar="DIR")

    form: FormName = option("exact", help="low-rank, sparse and one-bit lose a part of the change")
    rank: int | None = option(None, ge=1, help="low-rank: directions kept", metavar="N")
    energy: float = option(
        0.9, gt=0, le=1, help="low-rank: as many directions as hold this share of the change's "
        "squares, where --rank is absent", metavar="SHARE",
    )  # fmt: skip
    share: float = option(0.05, gt=0, le=1, help="sparse: numbers kept", metavar="SHARE")

    logits: bool = option(
        True, help="run base, fine-tune and adapter on sample prompts, in float32, one by one"
    )
    prompts: Path | None = option(
        None, help="prompts, one a line; our own when absent", metavar="FILE"
    )


def main(arguments: Sequence[str]) -> int:
    options = Extract.parse(PROGRAM, arguments)
    for name, form in _FORM_OF.items():
        if name in options.model_fields_set and options.form != form:
            raise UsageError(f"{PROGRAM}: --{name} is of --form {form}, not of {options.form}")
    for file in (options.out / CONFIG, options.out / WEIGHTS):
        if file.exists():
            raise UsageError(f"{PROGRAM}: --out {options.out} has an adapter already")
    report = _run(options)
    if options.as_json:
        print_json(report.as_json())
    else:
        _show(report)
    return 0


def _run(options: Extract) -> Extraction:
    texts = sample_texts(options.prompts)
    base, tuned = local_folder(options.base), local_folder(options.tuned)
    form = Form(options.form, options.rank, options.energy, options.share)
    options.out.mkdir(parents=True, exist_ok=True)
    with progress_bar("comparing") as progress:
        report = extract(base, tuned, options.out, form, progress)
    if not options.logits:
        return report
    disable_progress_bar()
    with progress_bar("running the models"):
        return replace(report, logits=logit_difference(base, tuned, options.out, texts))


def _show(report: Extraction) -> None:
    print_table(
        ("parameter", "form", "rank", "bytes", "of", "error of the change"),
        [
            (
                stored.parameter,
                stored.form,
                str(stored.rank or ""),
                in_words(stored.bytes),
                in_words(stored.full_bytes),
                f"{stored.relative_error:.2%}" if stored.relative_error else "",
            )
            for stored in report.stored
        ],
    )
    print()
    forms = (f"{in_words(size)} {form}" for form, size in report.bytes_by_form().items())
    print_facts(
        {
            "parameters": f"{len(report.stored)} stored, {report.unchanged} did not change",
            "forms": ", ".join(forms),
            "adapter": f"{in_words(report.bytes)}, {report.bytes / report.full_bytes:.1%} of the "
            f"fine-tune's {in_words(report.full_bytes)}",
            "logits": _logits(report),
        }
    )


def _logits(report: Extraction) -> str:
    if (found := report.logits) is None:
        return ""
    return (
        f"{found.largest:.2g} from the fine-tune's at most (the base: {found.base_largest:.2g}), "
        f"the same next token after {found.same_choice:.1%} of the tokens of "
        f"{found.prompts} prompts"
    )
