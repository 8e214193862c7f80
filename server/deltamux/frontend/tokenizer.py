"""The base model's own tokenizer and chat template, run in threads so that no stream waits."""

from __future__ import annotations

import asyncio
import copy
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import AddedToken as RustToken
from tokenizers import Tokenizer as RustTokenizer

from deltamux.adapters.checkpoint.tokenizer_file import AddedToken, parse_tokenizer
from deltamux.errors import FailedPrecondition, InvalidArgument, StartupError, first_line

THREADS = 2


class ChatMessage(Protocol):
    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as the token ids that the model gets."""

    text: str
    token_ids: tuple[int, ...]
    # Which of two texts each token belongs to; empty for one text.
    token_types: tuple[int, ...] = ()


class Tokenizer:
    """Text and chats to token ids and back, as transformers does it for this model."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers tokenizer backed by the `tokenizers` library."""
        if not getattr(tokenizer, "is_fast", False):
            raise StartupError("the model has no tokenizer that the tokenizers library can run")
        self._tokenizer = tokenizer
        self._tells_pairs_apart = "token_type_ids" in tokenizer.model_input_names
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")
        self._adopt(tokenizer.backend_tokenizer)

    def _adopt(self, backend: RustTokenizer) -> None:
        self._backend = backend
        # Some tokenizers are saved as they cut and padded their last batch.
        self._backend.no_truncation()
        self._backend.no_padding()
        # Reads the text of a special token as the plain characters that it is made of.
        self._plain = _twin(self._backend)
        self._plain.encode_special_tokens = True
        special = _special_texts(self._backend)
        self.special_ids = frozenset(special)
        texts = sorted(filter(None, special.values()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """From a model folder or hub id; raises StartupError when it has none."""
        # Takes seconds to import.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        # Whatever broken files make transformers stumble over.
        except Exception as error:
            why = first_line(error)
            raise StartupError(f"cannot load the tokenizer of {model}: {why}") from error
        return cls(tokenizer)

    @property
    def end_of_sequence(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def vocabulary(self) -> tuple[frozenset[tuple[int, str]], bytes]:
        """Its added tokens, and the digest of all its words."""
        file = parse_tokenizer(self._backend.to_str())
        added = frozenset((token.id, token.content) for token in file.added_tokens)
        return added, file.words()

    def extended(self, tokens: Sequence[AddedToken]) -> Tokenizer:
        """One with more tokens, and the same chat template.

        Raises FailedPrecondition (TOKENIZER_MISMATCH) where they are not its next ones.
        """
        backend = _twin(self._backend)
        ordered = sorted(tokens, key=lambda token: token.id)
        backend.add_tokens(list(map(_added, ordered)))
        for token in ordered:
            if backend.token_to_id(token.content) != token.id:
                raise FailedPrecondition(
                    f"the adapter's tokenizer has {token.content!r:.80} under the id {token.id}, "
                    "which is not the next one behind the base model's tokens",
                    reason="TOKENIZER_MISMATCH",
                )
        more = copy.copy(self)
        more._adopt(backend)
        return more

    async def encode(self, text: str, pair: str = "") -> Prompt:
        """A plain prompt: special tokens that the client wrote into it count as such.

        With `pair`, both texts in the tokenizer's own template.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, text, pair)

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> Prompt:
        """A chat under the model's template, up to where its answer begins.

        The text of a special token in a message stays text: nobody ends a turn from inside it.
        """
        if not self._tokenizer.chat_template:
            raise FailedPrecondition("the model has no chat template", reason="NO_CHAT_TEMPLATE")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_chat, messages)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def _encode(self, text: str, pair: str) -> Prompt:
        encoding = self._backend.encode(text, pair or None, add_special_tokens=True)
        types = encoding.type_ids if pair and self._tells_pairs_apart else ()
        return Prompt(text, tuple(encoding.ids), tuple(types))

    def _encode_chat(self, messages: Sequence[ChatMessage]) -> Prompt:
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        injected: list[str] = []

        def hide(match: re.Match[str]) -> str:
            injected.append(match.group())
            return f"{mark}{len(injected) - 1}\ue002"

        contents = [
            self._special.sub(hide, m.content) if self._special else m.content for m in messages
        ]
        rendered = self._render([m.role for m in messages], contents)
        pieces = re.split(f"{mark}([0-9]+)\ue002", rendered)
        token_ids: list[int] = []
        for position, piece in enumerate(pieces):
            if position % 2:
                pieces[position] = injected[int(piece)]
            reader = self._plain if position % 2 else self._backend
            token_ids += reader.encode(pieces[position], add_special_tokens=False).ids
        return Prompt("".join(pieces), tuple(token_ids))

    def _render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            # Templates refuse what they do not know (two turns of one role, say) by raising.
            raise InvalidArgument(
                f"the model's chat template refuses these messages: {error}"[:300],
                reason="CHAT_REFUSED",
                field="chat",
            ) from error
        return text


def _twin(backend: RustTokenizer) -> RustTokenizer:
    """Reads and writes as `backend` does, and can be given more tokens. The words and how they are
    cut are the same objects: a copy of them takes a second of Python and tens of megabytes."""
    twin = RustTokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (shared := getattr(backend, part)) is not None:
            setattr(twin, part, shared)
    # In one call, special ones too: each makes the tables of all of them anew.
    twin.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return twin


def _added(token: AddedToken) -> RustToken:
    return RustToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _special_texts(backend: RustTokenizer) -> dict[int, str]:
    """By their ids."""
    added = backend.get_added_tokens_decoder().items()
    return {number: token.content for number, token in added if token.special}
