"""One pass from logits to tokens for all rows of a step.

Filters come in the order of transformers' generate: temperature, top_k, top_p, min_p. Randomness
has no state: the uniform number behind a token is a hash of the request's seed, its choice and the
place of the token, so that a seed gives the same tokens in any batch and after any preemption.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltamux.engine.outcome import NonFinite, SampledToken
from deltamux.engine.sampling.logit_edits import edit_logits
from deltamux.engine.sequence import Scheduled
from deltamux.engine.transfer import Download, to_device
from deltamux.wire.messages import Logprob, Sampling, TokenLogprobs

# Below it, logits divided by the temperature would leave the range of float32.
_GREEDY_TEMPERATURE = 1e-5


Drawn = list[SampledToken | NonFinite]


class Draw(NamedTuple):
    """The tokens of a step, on the device and on their way to the host."""

    tokens: Tensor  # int64 [S]
    # Waits for them, and where there are none for all that was queued before.
    wait: Callable[[], Drawn]


def sample(logits: Tensor, shares: Rows[Scheduled]) -> Draw:
    """One token for each row of `logits` [S, V], float32, of the share at the same place.

    Queues all of it: nothing reads `logits` any more that is queued later.
    """
    # A sum is NaN or infinite when any of its terms is; it is the cheapest such test.
    sums = logits.sum(-1)
    tokens = _choose(edit_logits(logits, shares), shares)
    # One copy for both, as float32: that tells token ids apart up to 2^24.
    download = Download([torch.stack((tokens, sums))])
    logprobs = _logprobs(logits, tokens, shares)

    def drawn() -> Drawn:
        (arrived,) = download.wait()
        told = logprobs()
        token_ids, sound = arrived[0].astype(int).tolist(), np.isfinite(arrived[1]).tolist()
        return [
            SampledToken(token_id, told.get(row)) if sound[row] else NonFinite()
            for row, token_id in enumerate(token_ids)
        ]

    return Draw(tokens, drawn)


def uniform(seed: int, choice: int, place: int) -> float:
    """The number in [0, 1) behind token `place` of a choice, 0 being the first generated one."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, choice, place), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def _choose(logits: Tensor, shares: Rows[Scheduled]) -> Tensor:
    """Tokens [S], int64."""
    tokens = _argmax(logits)
    drawn = [row for row, share in enumerate(shares) if not _is_greedy(share.sequence.sampling)]
    if not drawn:
        return tokens
    if len(drawn) == len(shares):
        return _draw(logits, shares)
    rows = to_device(np.array(drawn), logits.device)
    tokens[rows] = _draw(logits[rows], [shares[row] for row in drawn])
    return tokens


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _GREEDY_TEMPERATURE


def _draw(logits: Tensor, shares: Rows[Scheduled]) -> Tensor:
    scores = filter_scores(logits, [share.sequence.sampling for share in shares])
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    numbers = _column([_uniform_of(share) for share in shares], cumulative)
    found = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)[:, 0]
    # Rows with NaN find nothing; they are reported, but must not index out of range before.
    return found.clamp_max_(logits.shape[1] - 1)


def filter_scores(logits: Tensor, samplings: Rows[Sampling]) -> Tensor:
    """Logits [S, V] over their temperatures, with -inf where a row's filters exclude a token.

    Each filter comes down to a border that a score must reach, so that equal scores share a fate.
    """
    scores = logits / _column([sampling.temperature for sampling in samplings], logits)
    borders = []
    if any(sampling.top_k or sampling.top_p < 1 for sampling in samplings):
        borders.append(_sorted_border(scores, samplings))
    if any(sampling.min_p for sampling in samplings):
        ratios = _column([sampling.min_p for sampling in samplings], logits)
        borders.append(scores.amax(-1, keepdim=True) + ratios.log())
    for border in borders:
        scores.masked_fill_(scores < border, float("-inf"))
    return scores


def _sorted_border(scores: Tensor, samplings: Rows[Sampling]) -> Tensor:
    """The smallest score [S, 1] that both top_k and top_p let through."""
    vocabulary = scores.shape[1]
    ascending = _ascending(scores)
    excluded = [vocabulary - min(s.top_k or vocabulary, vocabulary) for s in samplings]
    border = ascending.gather(1, to_device(np.array(excluded), scores.device)[:, None])
    ascending = ascending.masked_fill(ascending < border, float("-inf"))
    # The tail that may go has at most this mass; a top_p of 1 keeps even what has none.
    tail = _column([1 - s.top_p if s.top_p < 1 else -1.0 for s in samplings], scores)
    outside = ascending.softmax(-1).cumsum(-1) <= tail
    last = outside.sum(-1, keepdim=True).clamp_max_(vocabulary - 1)
    return ascending.gather(1, last).maximum(border)


def _ascending(scores: Tensor) -> Tensor:
    """Sorted along the vocabulary; on a CPU NumPy takes a tenth of torch's time."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    return scores.sort(-1).values


def _argmax(logits: Tensor) -> Tensor:
    """Along the vocabulary; on a CPU NumPy takes a tenth of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _uniform_of(share: Scheduled) -> float:
    seed = share.sequence.sampling.seed
    assert seed is not None, "sequences get a seed when they are submitted"
    return uniform(seed, share.sequence.index, share.generated)


def _column(numbers: list[float], like: Tensor) -> Tensor:
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return to_device(np.array(numbers, dtype=dtype), like.device)[:, None]


def _logprobs(
    logits: Tensor, tokens: Tensor, shares: Rows[Scheduled]
) -> Callable[[], dict[int, TokenLogprobs]]:
    """Of the rows that want them: log-probabilities of the model itself, before any edit."""
    wanted = {
        row: share.sequence.sampling.logprobs
        for row, share in enumerate(shares)
        if share.sequence.sampling.logprobs is not None
    }
    if not wanted:
        return dict
    rows = to_device(np.array(list(wanted)), logits.device)
    table = logits[rows].log_softmax(-1)
    chosen_ids = tokens[rows]
    chosen = table.gather(1, chosen_ids[:, None])[:, 0]
    top = table.topk(min(max(wanted.values()), table.shape[1]))
    download = Download([chosen_ids, chosen, top.indices, top.values])

    def told() -> dict[int, TokenLogprobs]:
        columns = zip(wanted.items(), *(part.tolist() for part in download.wait()), strict=True)
        return {
            row: TokenLogprobs(
                Logprob(token_id, logprob), tuple(map(Logprob, ids[:count], values[:count]))
            )
            for (row, count), token_id, logprob, ids, values in columns
        }

    return told
