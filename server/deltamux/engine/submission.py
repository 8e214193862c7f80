"""Turns a submitted request into sequences, after checking all that the device relies on."""

from __future__ import annotations

import math
import random

import msgspec

from deltamux.engine.limits import TOKEN_IDS, Limits
from deltamux.engine.sequence import Sequence
from deltamux.errors import FailedPrecondition, InvalidArgument
from deltamux.wire.messages import Sampling, Submit

# Exclusive bound of a seed: it must fit a signed 64-bit integer.
_SEEDS = 1 << 63


class Submissions:
    """Checks requests again, whatever the front end has checked, and gives each one a seed."""

    def __init__(self, limits: Limits, seed: int, prefix_caching: bool = True) -> None:
        self.limits = limits
        self._prefix_caching = prefix_caching
        self._seeds = random.Random(seed)

    def sequences(self, submit: Submit, now: float, tier: str) -> list[Sequence]:
        """One sequence a choice; the later ones share the first one's prompt blocks.

        Raises InvalidArgument when a value is out of range or the KV cache could never hold it.
        """
        self._check_kind(submit)
        self._check_lengths(submit)
        # An adapter may have a vocabulary of its own: the scheduler looks again once it is known.
        self.limits.check_token_ids(
            submit.prompt, submit.sampling.logit_bias, TOKEN_IDS if submit.adapter else 0
        )
        if not 0 <= (submit.sampling.logprobs or 0) <= self.limits.vocab_size:
            raise InvalidArgument("logprobs is out of range", field="output.logprobs")
        _check_sampling(submit.sampling)
        sampling = self._seeded(submit.sampling)
        sequences: list[Sequence] = []
        for index in range(submit.n):
            sequence = Sequence(
                request_id=submit.request_id,
                index=index,
                tokens=list(submit.prompt),
                num_prompt=len(submit.prompt),
                sampling=sampling,
                stopping=submit.stopping,
                priority=submit.priority,
                arrival=now,
                deadline=None if submit.deadline is None else now + submit.deadline,
                adapter=submit.adapter,
                adapter_path=submit.adapter_path,
                cache_salt=self._salt(submit),
                pooling=submit.pooling,
                token_types=submit.token_types,
                ids_below=1 + max((*submit.prompt, *sampling.logit_bias)),
                leader=sequences[0] if sequences else None,
                tier=tier,
            )
            sequences.append(sequence)
        return sequences

    def _salt(self, submit: Submit) -> str:
        """Without prefix caching, only the choices of one request share blocks."""
        return submit.cache_salt if self._prefix_caching else submit.request_id

    def _seeded(self, sampling: Sampling) -> Sampling:
        if sampling.seed is not None:
            return sampling
        return msgspec.structs.replace(sampling, seed=self._seeds.randrange(_SEEDS))

    def _check_kind(self, submit: Submit) -> None:
        if submit.pooling is None and not self.limits.generates:
            raise FailedPrecondition("the base model generates no text", reason="NO_GENERATION")
        types = submit.token_types
        if types and len(types) != len(submit.prompt):
            raise InvalidArgument("token_types are not as many as tokens", field="text_pair")
        if not all(0 <= kind < self.limits.token_types for kind in types):
            raise InvalidArgument("token_types are out of range", field="text_pair")

    def _check_lengths(self, submit: Submit) -> None:
        if submit.stopping.max_tokens < 1:
            raise InvalidArgument("max_tokens is below 1", field="stopping.max_tokens")
        if submit.n < 1:
            raise InvalidArgument("n is below 1", field="sampling.n")
        answer = 0 if submit.pooling else submit.stopping.max_tokens
        self.limits.check_room(len(submit.prompt), answer)


def _check_sampling(sampling: Sampling) -> None:
    sound = {
        "sampling.temperature": 0 <= sampling.temperature < math.inf,
        "sampling.top_p": 0 < sampling.top_p <= 1,
        "sampling.top_k": sampling.top_k >= 0,
        "sampling.min_p": 0 <= sampling.min_p <= 1,
        "sampling.repetition_penalty": 0 < sampling.repetition_penalty < math.inf,
        "sampling.presence_penalty": math.isfinite(sampling.presence_penalty),
        "sampling.frequency_penalty": math.isfinite(sampling.frequency_penalty),
        "sampling.seed": sampling.seed is None or 0 <= sampling.seed < _SEEDS,
        "sampling.logit_bias": all(map(math.isfinite, sampling.logit_bias.values())),
    }
    for field, is_sound in sound.items():
        if not is_sound:
            raise InvalidArgument(f"{field} is out of range", field=field)
