"""One adapter through the engine's packed, mixed step, against its library alone."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.checkpoint.manifest import read_manifest
from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.task import Task
from deltamux.base.load import Base, load_base
from deltamux.extract.samples import token_ids
from deltamux.verify.alone import Question, Rows
from deltamux.verify.interpreter import Interpreter
from deltamux.verify.mixed import generates, mixed_answers
from deltamux.verify.reference import reference, require_library

# What the library's model of an adapter for that task is loaded by.
_AUTO_CLASSES: Mapping[Task, str] = {
    "generation": "AutoModelForCausalLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "features": "AutoModel",
}


@dataclass(frozen=True)
class Verification:
    """Over all prompts: how far the adapter's rows are from the library's, and how far the base's
    rows of the same steps are from the base's.

    `compared` says what both are, the adapter's first. Where both are of a kind, `effect` is how
    much the adapter moves them at all; where they are logits of tokens, `same_choice` is the share
    of tokens behind which both choose the same next one.
    """

    library: str
    prompts: int
    tokens: int
    compared: tuple[Rows, Rows]
    largest: float
    base_largest: float
    same_choice: float | None
    effect: float | None

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
    question = _question(adapter, model, base, parsed, prompts)
    ours = mixed_answers(base, parsed, prompts)
    # Its modules hold each other, and torch keeps what they held of a GPU from other processes.
    del base
    gc.collect()
    torch.cuda.empty_cache()
    theirs = reference(question, elsewhere)
    with_adapter, without = torch.cat(ours[: len(prompts)]), torch.cat(ours[len(prompts) :])
    adapted, plain = torch.cat(theirs.adapted), torch.cat(theirs.plain)
    same = (with_adapter.argmax(-1) == adapted.argmax(-1)).float().mean()
    return Verification(
        library=theirs.library,
        prompts=len(prompts),
        tokens=sum(map(len, prompts)),
        compared=(question.adapted, question.plain),
        largest=float((with_adapter - adapted).abs().max()),
        base_largest=float((without - plain).abs().max()),
        same_choice=float(same) if question.plain == "logits" else None,
        effect=_effect(adapted, plain) if question.adapted == question.plain else None,
    )


def _effect(adapted: Tensor, plain: Tensor) -> float:
    """Over the tokens that both know."""
    shared = min(adapted.shape[1], plain.shape[1])
    return float((adapted[:, :shared] - plain[:, :shared]).abs().max())


def _question(
    adapter: Path, model: str, base: Base, parsed: Adapter, prompts: Sequence[Sequence[int]]
) -> Question:
    text = generates(base, parsed)
    # An adapter for an encoder that does not tell its task speaks of the encoder inside a model.
    task = parsed.task if text or parsed.task != "generation" else "sequence"
    config: dict[str, int] = {}
    if parsed.head is not None:
        plan = parsed.head.plan
        config["num_labels"] = len(plan.labels)
        if plan.pooling == "last" and plan.pad_token_id is not None:
            config["pad_token_id"] = plan.pad_token_id
    return Question(
        library=read_manifest(adapter).library,
        adapter=str(adapter.absolute()),
        model=model,
        auto_class=_AUTO_CLASSES[task],
        config=config,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        prompts=prompts,
        plain="logits" if text else "embeddings",
        adapted="logits" if text or parsed.head is not None else "embeddings",
        vocab_size=parsed.vocab_size,
    )
