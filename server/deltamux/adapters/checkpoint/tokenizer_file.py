"""The tokens that a tokenizer.json beside an adapter adds to the base's.

Nothing else of the file is used: its patterns belong to whoever made the adapter, and are never
compiled. Whether its words are the base's own is compared.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from deltamux.adapters.checkpoint.files import TOKENIZER, open_tokenizer
from deltamux.errors import InvalidArgument

_MAX_BYTES = 64 << 20


class AddedToken(msgspec.Struct, frozen=True):
    """As the tokenizers library writes it."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    # Older versions of the library write a pair as one string.
    merges: list[str | tuple[str, str]] = []


class TokenizerFile(msgspec.Struct, frozen=True):
    added_tokens: tuple[AddedToken, ...]
    model: msgspec.Raw

    def words(self) -> bytes:
        """A digest of all words and merges, whichever version of the library wrote them."""
        model = _decode(self.model, _MODEL)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.merges]
        written = msgspec.json.encode((model.vocab, merges), order="sorted")
        return hashlib.sha256(written).digest()


# Made before any thread reads with them: see header.py.
_FILE, _MODEL = msgspec.json.Decoder(TokenizerFile), msgspec.json.Decoder(_Model)
_Part = TypeVar("_Part", TokenizerFile, _Model)


def read_tokenizer(folder: Path) -> TokenizerFile | None:
    """None where an adapter brings no tokenizer. Raises InvalidArgument (MALFORMED_TOKENIZER)."""
    try:
        file = open_tokenizer(folder)
    except FileNotFoundError:
        return None
    with file:
        if os.fstat(file.fileno()).st_size > _MAX_BYTES:
            raise InvalidArgument(
                f"{TOKENIZER} has more than {_MAX_BYTES} bytes", reason="TOO_LARGE"
            )
        return parse_tokenizer(file.read())


def parse_tokenizer(data: bytes | str) -> TokenizerFile:
    """Raises InvalidArgument (MALFORMED_TOKENIZER)."""
    return _decode(data, _FILE)


def _decode(data: bytes | str | msgspec.Raw, decoder: msgspec.json.Decoder[_Part]) -> _Part:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"{TOKENIZER} is malformed: {error}"
        raise InvalidArgument(message[:300], reason="MALFORMED_TOKENIZER") from None
