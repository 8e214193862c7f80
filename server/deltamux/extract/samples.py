"""Prompts to compare two models on: a file's lines, or a few of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from deltamux.errors import InvalidArgument

_PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: what is the capital of France?\nAnswer:",
    "def fibonacci(n):\n    ",
    "Dear customer, thank you for your message. We are sorry to hear that",
)
_MAX_TOKENS = 512


def sample_texts(file: Path | None) -> tuple[str, ...]:
    """The file's lines that are not empty. Raises InvalidArgument for a file without any, and
    OSError."""
    if file is None:
        return _PROMPTS
    try:
        texts = tuple(line for line in file.read_text().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{file} cannot be read: {error}") from None
    if not texts:
        raise InvalidArgument(f"{file} has no prompts: one a line is expected")
    return texts


def token_ids(texts: tuple[str, ...], model: str, vocab_size: int) -> list[list[int]]:
    """The tokens of each text, by the model's own tokenizer, at most 512 a text.

    A model without a tokenizer gets random tokens in place of our own texts; for others
    InvalidArgument is raised.
    """
    tokenizer = _tokenizer(model)
    read = [] if tokenizer is None else [tokenizer(text)["input_ids"] for text in texts]
    # transformers makes some models a tokenizer out of nothing, which reads nothing.
    if found := [ids[:_MAX_TOKENS] for ids in read if ids]:
        return found
    if texts is not _PROMPTS:
        raise InvalidArgument(f"{model} has no tokenizer to read the prompts with")
    generator = torch.Generator().manual_seed(0)
    random: list[list[int]] = torch.randint(
        vocab_size, (len(texts), 16), generator=generator
    ).tolist()
    return random


def _tokenizer(model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
