"""Streaming text against decoding it whole, and stop strings against searching it whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.frontend.detokenizer import CONTEXT, LONGEST, Detokenizer, StopStrings
from deltamux.frontend.tokenizer import Tokenizer


def streamed(tokenizer: Tokenizer, prompt: list[int], token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=True)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


@given(text=st.text(), prompt=st.text())
def test_pieces_are_whole_characters_and_add_up(tokenizer, reference, text, prompt) -> None:
    ids = reference.encode(text, add_special_tokens=False)
    before = reference.encode(prompt, add_special_tokens=False)
    pieces = streamed(tokenizer, before, ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(token_ids=st.lists(st.integers(0, 258)))
def test_bytes_that_are_no_text_end_up_as_decoding_them_whole(
    tokenizer, reference, token_ids
) -> None:
    whole = reference.decode(token_ids, skip_special_tokens=True)
    together = "".join(streamed(tokenizer, [], token_ids))
    # How many replacement characters stand for bad bytes depends on where they are cut.
    assert _squeezed(together) == _squeezed(whole)


def _squeezed(text: str) -> str:
    return "".join(c for i, c in enumerate(text) if c != "\ufffd" or text[i - 1 : i] != c)


def test_bytes_that_never_make_a_character_do_not_wait_for_ever(tokenizer, reference) -> None:
    bad = reference.encode("é", add_special_tokens=False)[1]
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
    shown = "".join(detokenizer.push(bad) for _ in range(100))
    assert len(shown) >= 97


def test_a_token_is_decoded_once_and_seldom_twice(tokenizer, reference, monkeypatch) -> None:
    decode, decoded = tokenizer.decode, []

    def counted(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        decoded.append(len(token_ids))
        return decode(token_ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counted)
    ids = reference.encode("abcdefgh" * 50, add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids[:3], ids)) == "abcdefgh" * 50
    before_and_after = 2
    assert len(decoded) <= len(ids) * (1 + 1 / (LONGEST - CONTEXT)) + before_and_after
    assert max(decoded) <= LONGEST + 1


def test_a_word_keeps_the_space_that_the_prompt_asks_for() -> None:
    """Tokenizers of the SentencePiece kind drop the first space of what they decode."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = RustTokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == "bc"
    assert "".join(streamed(tokenizer, [0], [1, 2, 1])) == " bc b"


def search_whole(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """The stop string that ends first, the longest of those."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return min(found) if found else None


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=5),
    include_stop=st.booleans(),
)
def test_where_it_stops_does_not_depend_on_how_the_text_is_cut(
    text, stops, cuts, include_stop
) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    finder, shown, matched = StopStrings(stops, include_stop), "", None
    for start, end in itertools.pairwise(bounds):
        piece, matched = finder.push(text[start:end])
        shown += piece
        if matched:
            break
        assert not any(stop in shown for stop in stops)
    wanted = search_whole(text, stops)
    if wanted is None:
        assert (shown + finder.flush(), matched) == (text, None)
    else:
        end, length, stop = wanted
        assert matched == stop
        assert shown == text[: end if include_stop else end + length]


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [([], "abc", "abc"), (["xyz"], "abx", "ab"), (["xyz"], "abxz", "abxz"), (["aab"], "aa", "")],
)
def test_only_what_may_begin_a_stop_string_is_held(stops, text, shown) -> None:
    assert StopStrings(stops, include_stop=False).push(text) == (shown, None)
