"""Texts of adapters that bring tokens of their own, as transformers reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deltamux.adapters.checkpoint.tokenizer_file import read_tokenizer
from deltamux.errors import DeltamuxError
from deltamux.frontend import adapter_tokenizers
from deltamux.frontend.adapter_tokenizers import AdapterTokenizers

TOKENS = [
    "<tool>",
    AddedToken("<|done|>", special=True),
    AddedToken("word", single_word=True, lstrip=True, normalized=False),
    AddedToken("café", normalized=True),
]
TEXTS = ["a <tool>b</tool> <tool><tool>", "word sword  word", "<|done|>café é<s>", "plain"]


def lease(folder: Path) -> Any:
    return SimpleNamespace(version=folder.name, path=str(folder))


@pytest.fixture
def save(model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """save(tokens, change) -> an adapter's folder with the base's tokenizer and these tokens."""

    def save(
        tokens: list[Any], change: Callable[[dict[str, Any]], object] = lambda file: None
    ) -> Path:
        folder = tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(folder)
        file = json.loads((folder / "tokenizer.json").read_text())
        change(file)
        (folder / "tokenizer.json").write_text(json.dumps(file))
        return folder

    return save


@pytest.fixture
def tokenizers(tokenizer) -> AdapterTokenizers:
    return AdapterTokenizers(tokenizer)


async def test_texts_are_read_and_written_as_by_transformers(tokenizers, save) -> None:
    folder = save(TOKENS)
    oracle = AutoTokenizer.from_pretrained(folder)
    own = await tokenizers.of(lease(folder))
    for text in TEXTS:
        prompt = await own.encode(text)
        assert list(prompt.token_ids) == oracle.encode(text)
        for skip in (False, True):
            written = own.decode(prompt.token_ids, skip_special_tokens=skip)
            assert written == oracle.decode(prompt.token_ids, skip_special_tokens=skip)
    assert max((await own.encode(TEXTS[0])).token_ids) >= len(oracle) - 4


async def test_chats_are_rendered_by_the_bases_template(
    tokenizers, save, reference: PreTrainedTokenizerFast
) -> None:
    """That of the adapter would be run; it is not even copied."""
    folder = save(TOKENS)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    message = SimpleNamespace(role="user", content="use <tool>, not <|done|></s>")
    prompt = await (await tokenizers.of(lease(folder))).encode_chat([message])
    assert prompt.text == reference.apply_chat_template(
        [vars(message)], tokenize=False, add_generation_prompt=True
    )
    oracle = AutoTokenizer.from_pretrained(folder)
    tool, done = oracle.convert_tokens_to_ids(["<tool>", "<|done|>"])
    # A token that is not special is read wherever it stands; nobody ends a turn with one that is.
    assert tool in prompt.token_ids and done not in prompt.token_ids
    assert list(prompt.token_ids).count(1) == 1


async def test_adapters_share_what_is_the_same(tokenizers, tokenizer, save, tmp_path) -> None:
    first = await tokenizers.of(lease(save(TOKENS)))
    assert first is await tokenizers.of(lease(save(TOKENS)))
    assert first is not tokenizer
    assert await tokenizers.of(lease(save([]))) is tokenizer
    (tmp_path / "bare").mkdir()
    assert await tokenizers.of(lease(tmp_path / "bare")) is tokenizer
    assert await tokenizers.of(None) is tokenizer
    assert len((await tokenizer.encode("<tool>")).token_ids) == len("<tool>")


async def test_the_rest_of_an_adapters_tokenizer_is_not_used(tokenizers, save) -> None:
    """Its patterns would be compiled, and run on every prompt."""
    pattern = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    own = await tokenizers.of(lease(save(TOKENS, lambda f: f.update(pre_tokenizer=pattern))))
    assert own.decode((await own.encode("a <tool>")).token_ids, True) == "a <tool>"


async def test_merges_may_be_written_in_the_old_way(tokenizers, save) -> None:
    """The library's two ways to write a pair are one."""
    old = save(TOKENS, lambda file: file["model"].update(merges=["a b"]))
    new = save(TOKENS, lambda file: file["model"].update(merges=[["a", "b"]]))
    words = [file.words() for folder in (old, new) if (file := read_tokenizer(folder))]
    assert words[0] == words[1]


def moved(file: dict[str, Any]) -> None:
    file["added_tokens"][-1]["id"] += 1


def renamed(file: dict[str, Any]) -> None:
    """A token that the base has reserved."""
    file["added_tokens"][0]["content"] = "<mine>"


def another_word(file: dict[str, Any]) -> None:
    file["model"]["vocab"]["ĀĀ"] = 999


@pytest.mark.parametrize("change", [moved, renamed, another_word])
async def test_tokens_that_are_not_behind_the_bases_are_refused(change, tokenizers, save) -> None:
    folder = save(TOKENS, change)
    for _ in range(2):
        with pytest.raises(DeltamuxError) as caught:
            await tokenizers.of(lease(folder))
        assert caught.value.reason == "TOKENIZER_MISMATCH"
    # To find out takes a second of as many tokens as there may be, in which no stream goes on.
    assert tokenizers._extended.cache_info().misses <= 1


@pytest.mark.parametrize("name", ["_MOST_ADDED", "_MOST_SPECIAL"])
async def test_too_many_tokens_are_refused(name, tokenizers, save, monkeypatch) -> None:
    monkeypatch.setattr(adapter_tokenizers, name, 0)
    with pytest.raises(DeltamuxError, match="more than") as caught:
        await tokenizers.of(lease(save(TOKENS)))
    assert caught.value.reason == "TOKENIZER_MISMATCH"


async def test_files_that_are_gone_are_not_taken_for_none(tokenizers, tmp_path: Path) -> None:
    with pytest.raises(DeltamuxError) as caught:
        await tokenizers.of(lease(tmp_path / "evicted"))
    assert caught.value.code == "UNAVAILABLE"
