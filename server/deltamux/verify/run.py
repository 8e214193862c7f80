"""One adapter through the engine's packed, mixed step, against its library alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltamux.adapters.manifest import read_manifest
from deltamux.adapters.parse import parse_adapter
from deltamux.base.load import load_base
from deltamux.extract.samples import token_ids
from deltamux.verify.alone import Question
from deltamux.verify.interpreter import Interpreter
from deltamux.verify.path import mixed_logits
from deltamux.verify.reference import reference, require_library


@dataclass(frozen=True)
class Verification:
    """Over all tokens of all prompts: how far the adapter's rows are from the library's, and how
    far the base's rows of the same steps are from the base's; the share of tokens behind which
    both choose the same next one; and how much the adapter moves the logits at all."""

    library: str
    prompts: int
    tokens: int
    largest: float
    base_largest: float
    same_choice: float
    effect: float

    def within(self, tolerance: float) -> bool:
        return self.largest <= tolerance and self.base_largest <= tolerance

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    adapter: Path,
    model: str,
    texts: tuple[str, ...],
    device: str,
    dtype: str,
    elsewhere: Interpreter | None = None,
) -> Verification:
    """Loads the model twice, one after the other; for the library, with `elsewhere` if given.

    Raises StartupError for a model, and InvalidArgument or FailedPrecondition for an adapter,
    that is not served, or for a library that is not to be had.
    """
    if elsewhere is None:
        require_library(adapter)
    base = load_base(model, device, dtype)
    parsed = parse_adapter(adapter, adapter.name, base.structure, base.dtype)
    # An activated LoRA sleeps until its invocation.
    invocation = [*parsed.traits.invocation]
    prompts = [ids + invocation for ids in token_ids(texts, model, base.vocab_size)]
    question = Question(
        library=read_manifest(adapter).library,
        adapter=str(adapter.absolute()),
        model=model,
        prompts=prompts,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )
    ours = mixed_logits(base, parsed, prompts)
    del base
    theirs = reference(question, elsewhere)
    with_adapter, without = torch.cat(ours[: len(prompts)]), torch.cat(ours[len(prompts) :])
    adapted, plain = torch.cat(theirs.adapted), torch.cat(theirs.plain)
    return Verification(
        library=theirs.library,
        prompts=len(prompts),
        tokens=len(adapted),
        largest=float((with_adapter - adapted).abs().max()),
        base_largest=float((without - plain).abs().max()),
        same_choice=float((with_adapter.argmax(-1) == adapted.argmax(-1)).float().mean()),
        effect=float((adapted - plain).abs().max()),
    )
