"""Endless training batches: texts of many kinds, each with its right answer."""

import random
import string
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from deltamux.demo.tasks import LONGEST_TEXT, is_held_out, prompt, sentence

IGNORED = -100  # the label that cross entropy leaves out

POOL = 8  # batches sorted by length together, so that little of a batch is padding

Answer = Callable[[str], str]
Batch = dict[str, torch.Tensor]


def batches(
    tokenizer: PreTrainedTokenizerBase, answer: Answer, size: int, seed: int
) -> Iterator[Batch]:
    """Batches of `size` examples: `input_ids` and `labels`, both int64 [size, longest]."""
    source = random.Random(seed)
    while True:
        texts = sorted((_training_text(source) for _ in range(POOL * size)), key=len)
        for start in source.sample(range(0, POOL * size, size), POOL):
            yield _batch(tokenizer, answer, texts[start : start + size])


def labelled_batches(
    tokenizer: PreTrainedTokenizerBase, answer: Answer, labels: Sequence[str], size: int, seed: int
) -> Iterator[Batch]:
    """Of `size` texts: `input_ids` [size, longest] and the `labels` [size], which one each is."""
    source = random.Random(seed)
    while True:
        texts = [_training_text(source) for _ in range(size)]
        rows = tokenizer([prompt(text) for text in texts])["input_ids"]
        yield {
            "input_ids": _padded(rows, tokenizer.pad_token_id),
            "labels": torch.tensor([labels.index(answer(text)) for text in texts]),
        }


def _batch(tokenizer: PreTrainedTokenizerBase, answer: Answer, texts: list[str]) -> Batch:
    asked = tokenizer([prompt(text) for text in texts])["input_ids"]
    wanted = tokenizer([answer(text) for text in texts], add_special_tokens=False)["input_ids"]
    ended = [[*ids, tokenizer.eos_token_id] for ids in wanted]
    rows = [question + reply for question, reply in zip(asked, ended, strict=True)]
    labels = [
        [IGNORED] * len(question) + reply for question, reply in zip(asked, ended, strict=True)
    ]
    return {
        "input_ids": _padded(rows, tokenizer.pad_token_id),
        "labels": _padded(labels, IGNORED),
    }


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def _training_text(source: random.Random) -> str:
    while True:
        kind = source.choices((sentence, _pseudo_words, _noise), weights=(5, 4, 2))[0]
        text = kind(source)
        if not is_held_out(text):
            return text


def _pseudo_words(source: random.Random) -> str:
    return _words_of(string.ascii_lowercase, source)


def _noise(source: random.Random) -> str:
    return _words_of(string.ascii_letters + string.digits + string.punctuation, source)


def _words_of(alphabet: str, source: random.Random) -> str:
    words = ("".join(source.choices(alphabet, k=source.randint(1, 8))) for _ in range(6))
    return " ".join(words)[: source.randint(1, LONGEST_TEXT)].rstrip()
