"""What the model and its cache can take, and whether a request stays within it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deltamux.errors import InvalidArgument

# Exclusive bound of a token id: the device holds them as signed 32-bit integers in places.
TOKEN_IDS = 1 << 31


@dataclass(frozen=True)
class Limits:
    vocab_size: int
    max_model_len: int
    # Tokens that the KV cache holds when one sequence has it to itself.
    kv_cache_tokens: int
    # False: tokens all see each other, and a prompt is only ever pooled, whole.
    generates: bool = True
    # Kinds of segments that a prompt may have; 0 where none are told apart.
    token_types: int = 0

    def check_room(self, prompt: int, answer: int, virtual: int = 0) -> None:
        """Raises InvalidArgument where the context has no room for the prompt and, unless `answer`
        is 0, a token behind it, or the KV cache never for all tokens at once.

        `virtual` tokens of the adapter stand in front of the prompt.
        """
        # The last token is only ever an output: it needs no place in the cache.
        output = min(answer, 1)
        behind = f" behind the adapter's {virtual} virtual tokens" if virtual else ""
        most = self.max_model_len - virtual - output
        if not 1 <= prompt <= most:
            raise InvalidArgument(
                f"the prompt has {prompt} tokens, not 1 to {most}{behind}",
                reason="PROMPT_LENGTH",
                field="input",
            )
        longest = min(virtual + prompt + answer, self.max_model_len) - output
        if longest > self.kv_cache_tokens:
            raise InvalidArgument(
                f"prompt and max_tokens need {longest} tokens of KV cache{behind}; "
                f"there are {self.kv_cache_tokens}",
                reason="KV_CACHE_TOO_SMALL",
                field="stopping.max_tokens",
            )

    def check_token_ids(
        self, prompt: Iterable[int], biased: Iterable[int], vocab_size: int = 0
    ) -> None:
        """Raises InvalidArgument for an id that the vocabulary does not have: the base's, unless
        `vocab_size` tells of another."""
        size = vocab_size or self.vocab_size
        fields = {"token_ids": prompt, "sampling.logit_bias": biased}
        for field, token_ids in fields.items():
            for token_id in token_ids:
                if not 0 <= token_id < size:
                    raise InvalidArgument(
                        f"{field} holds {token_id}; the vocabulary has {size}",
                        reason="TOKEN_ID_OUT_OF_RANGE",
                        field=field,
                    )
