"""Which tokenizer reads and writes the texts of an adapter."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from pathlib import Path

from deltamux.adapters.checkpoint.tokenizer_file import AddedToken, read_tokenizer
from deltamux.errors import FailedPrecondition, Unavailable
from deltamux.frontend.tokenizer import Tokenizer
from deltamux.store.catalog.lease import Lease

# Contents whose added tokens are known, and tokenizers that hold such tokens: one with the most of
# them takes some 40 MB, and with a thousand it is made again in ten milliseconds.
_CONTENTS, _TOKENIZERS = 16_384, 16
# Of one adapter. Special ones are looked for, one by one, in the messages of each chat.
_MOST_ADDED, _MOST_SPECIAL = 1 << 16, 1 << 10


class AdapterTokenizers:
    """The base's own for most; with more tokens for an adapter whose tokenizer.json adds them.

    Adapters that add the same tokens share one. All else of a tokenizer, and the chat template, is
    the base's.
    """

    def __init__(self, base: Tokenizer) -> None:
        self._base = base
        self._known, self._words = base.vocabulary
        # By content: the tokens that it adds, or why it cannot be served.
        self._added: dict[str, tuple[AddedToken, ...] | FailedPrecondition] = {}
        self._extended = lru_cache(_TOKENIZERS)(self._extend)

    def has_read(self, digest: str) -> bool:
        """Whether the files of this content are needed no more."""
        return digest in self._added

    async def of(self, lease: Lease | None) -> Tokenizer:
        """Raises FailedPrecondition (TOKENIZER_MISMATCH) for an adapter whose tokenizer has other
        words than the base's beside added tokens."""
        if lease is None:
            return self._base
        added = self._added.get(lease.version)
        if added is None:
            added = await asyncio.to_thread(self._read, Path(lease.path))
            self._added[lease.version] = added
            if len(self._added) > _CONTENTS:
                del self._added[next(iter(self._added))]
        if not added:
            return self._base
        if isinstance(added, FailedPrecondition):
            raise added.with_traceback(None)
        extended = await asyncio.to_thread(self._extended, added)
        if isinstance(extended, FailedPrecondition):
            raise extended.with_traceback(None)
        return extended

    def _extend(self, tokens: tuple[AddedToken, ...]) -> Tokenizer | FailedPrecondition:
        """To find out that it cannot be takes as long: the answer is kept like the other."""
        try:
            return self._base.extended(tokens)
        except FailedPrecondition as error:
            return error.with_traceback(None)

    def _read(self, folder: Path) -> tuple[AddedToken, ...] | FailedPrecondition:
        if not folder.is_dir():
            raise Unavailable("the adapter's files have just left the disk", retry_after=1.0)
        file = read_tokenizer(folder)
        tokens = () if file is None else file.added_tokens
        added = tuple(token for token in tokens if (token.id, token.content) not in self._known)
        if file is None or not added:
            return ()
        if len(added) > _MOST_ADDED or sum(token.special for token in added) > _MOST_SPECIAL:
            return _refused(f"more than {_MOST_ADDED} tokens, or {_MOST_SPECIAL} special ones")
        if file.words() != self._words:
            return _refused("tokens to other words than the base model's")
        return added


def _refused(what: str) -> FailedPrecondition:
    message = f"the adapter's tokenizer adds {what}"
    return FailedPrecondition(message, reason="TOKENIZER_MISMATCH")
