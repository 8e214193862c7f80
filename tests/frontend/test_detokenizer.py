"""Streaming text against decoding it whole, and stop strings against searching it whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
@example(token_ids=[159, 0, 0, 97, 97])  # a character with special tokens in it
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


def byte_fallback() -> Tokenizer:
    """What Llama 2 and Gemma do with a character that is no token: one token a byte of it.

    They decode a row of such tokens together, and all of it is replaced where one byte is too many.
    """
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocabulary |= {"▁": 257, "a": 258, "b": 259}
    backend = RustTokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


BYTE_FALLBACK = byte_fallback()


@given(text=st.text("ab é中😀😁", max_size=20), prompt=st.text("ab é中😀😁", max_size=8))
def test_rows_of_characters_in_byte_tokens_are_never_decoded_from_within_one(text, prompt) -> None:
    before, ids = (list(BYTE_FALLBACK._encode(part, "").token_ids) for part in (prompt, text))
    assert "".join(streamed(BYTE_FALLBACK, before, ids)) == text


def test_tokens_that_each_end_one_character_and_begin_the_next_are_not_cut() -> None:
    first, across, last = "ãĥ", "«ãĥ", "«"  # of ル, whose bytes are e3 83 ab
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, first, across])}
    backend = RustTokenizer(models.BPE(vocab=vocabulary, merges=[("ã", "ĥ"), ("«", first)]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    pieces = [first, *[across] * 8, last, "a"]
    assert (
        "".join(streamed(tokenizer, [], [vocabulary[piece] for piece in pieces])) == "ル" * 9 + "a"
    )


def test_a_word_keeps_the_space_that_the_prompt_asks_for() -> None:
    """Tokenizers of the SentencePiece kind drop the first space of what they decode."""
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
