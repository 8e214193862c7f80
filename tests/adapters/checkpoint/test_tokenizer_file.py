"""A tokenizer.json that is broken is refused when the adapter is copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltamux.adapters.checkpoint import tokenizer_file
from deltamux.adapters.checkpoint.tokenizer_file import parse_tokenizer, read_tokenizer
from deltamux.errors import InvalidArgument

SOUND = '{"added_tokens": [{"id": 3, "content": "<a>", "special": true}], "model": {"vocab": {}}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        SOUND[:-1],
        SOUND.replace("3", "true"),
        SOUND.replace('"<a>"', "7"),
        '{"added_tokens": ' + "[" * 100_000,
    ],
)
def test_what_is_no_tokenizer(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        read_tokenizer(tmp_path)
    assert caught.value.reason == "MALFORMED_TOKENIZER"


@pytest.mark.parametrize("model", ["[]", "{}", '{"vocab": 3}', '{"vocab": {}, "merges": [["a"]]}'])
def test_what_is_no_model(model: str) -> None:
    file = parse_tokenizer(SOUND.replace('{"vocab": {}}', model))
    with pytest.raises(InvalidArgument) as caught:
        file.words()
    assert caught.value.reason == "MALFORMED_TOKENIZER"


def test_links_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "other").write_text(SOUND)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "other")
    with pytest.raises(InvalidArgument, match="not a readable regular file"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(SOUND)
    assert read_tokenizer(tmp_path) is not None
    monkeypatch.setattr(tokenizer_file, "_MAX_BYTES", len(SOUND) - 1)
    with pytest.raises(InvalidArgument) as caught:
        read_tokenizer(tmp_path)
    assert caught.value.reason == "TOO_LARGE"
