"""One pass from logits to tokens for all rows of a step.

Filters come in the order of transformers' generate: temperature, top_k, top_p, min_p. Randomness
has no state: the uniform number behind a token is a hash of the request's seed, its choice and the
place of the token, so that a seed gives the same tokens in any batch and after any preemption.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltamux.engine.logit_edits import edit_logits
from deltamux.engine.sequence import Sequence
from deltamux.engine.transfer import to_device
from deltamux.wire.messages import Logprob, Sampling, TokenLogprobs

# Below it, logits divided by the temperature would leave the range of float32.
_GREEDY_TEMPERATURE = 1e-5
# How many of the likeliest tokens to sort before the whole vocabulary is sorted.
_NUCLEUS_WIDTHS = (256, 4096)


@dataclass(frozen=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class NonFinite:
    """The row's logits hold NaN or infinity: its adapter overflows, or is broken."""


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[SampledToken | NonFinite]:
    """One token for each row of `logits` [S, V], float32, of the sequence at the same place."""
    if not sequences:
        return []
    # A sum is NaN or infinite when any of its terms is; it is the cheapest such test.
    finite = logits.sum(-1).isfinite()
    tokens = _choose(edit_logits(logits, sequences), sequences)
    logprobs = _logprobs(logits, tokens, sequences)
    token_ids, sound = torch.stack((tokens, finite)).tolist()
    return [
        SampledToken(token_id, logprobs.get(row)) if sound[row] else NonFinite()
        for row, token_id in enumerate(token_ids)
    ]


def uniform(seed: int, choice: int, place: int) -> float:
    """The number in [0, 1) behind token `place` of a choice, 0 being the first generated one."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, choice, place), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def _choose(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Tokens [S], int64."""
    tokens = logits.argmax(-1)
    drawn = [row for row, sequence in enumerate(sequences) if not _is_greedy(sequence.sampling)]
    if len(drawn) == len(sequences):
        return _draw(logits, sequences)
    if drawn:
        rows = to_device(np.array(drawn), logits.device)
        tokens[rows] = _draw(logits[rows], [sequences[row] for row in drawn])
    return tokens


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _GREEDY_TEMPERATURE


def _draw(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    scores = filter_scores(logits, [sequence.sampling for sequence in sequences])
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    numbers = _column([_uniform_of(sequence) for sequence in sequences], cumulative)
    found = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)[:, 0]
    # Rows with NaN find nothing; they are reported, but must not index out of range before.
    return found.clamp_max_(logits.shape[1] - 1)


def filter_scores(logits: Tensor, samplings: Rows[Sampling]) -> Tensor:
    """Logits [S, V] over their temperatures, with -inf where a row's filters exclude a token."""
    scores = logits / _column([sampling.temperature for sampling in samplings], logits)
    _limit_top_k(scores, [sampling.top_k for sampling in samplings])
    _limit_top_p(scores, [sampling.top_p for sampling in samplings])
    _limit_min_p(scores, [sampling.min_p for sampling in samplings])
    return scores


def _uniform_of(sequence: Sequence) -> float:
    seed = sequence.sampling.seed
    assert seed is not None, "sequences get a seed when they are submitted"
    return uniform(seed, sequence.index, sequence.num_generated)


def _column(numbers: list[float], like: Tensor) -> Tensor:
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return to_device(np.array(numbers, dtype=dtype), like.device)[:, None]


def _limit_top_k(scores: Tensor, limits: list[int]) -> None:
    """Keeps the k largest scores of a row, and all that equal the k-th; k 0 keeps all."""
    vocabulary = scores.shape[1]
    rows = [row for row, limit in enumerate(limits) if 0 < limit < vocabulary]
    if not rows:
        return
    index = to_device(np.array(rows), scores.device)
    chosen = scores[index]
    largest = chosen.topk(max(limits[row] for row in rows)).values
    last = to_device(np.array([limits[row] - 1 for row in rows]), scores.device)
    scores[index] = _drop_below(chosen, largest.gather(1, last[:, None]))


def _limit_top_p(scores: Tensor, masses: list[float]) -> None:
    """Keeps the likeliest tokens of a row until they reach mass p, and ties of the last."""
    rows = [row for row, mass in enumerate(masses) if mass < 1]
    if not rows:
        return
    index = to_device(np.array(rows), scores.device)
    chosen = scores[index]
    mass = _column([masses[row] for row in rows], scores)
    scores[index] = _drop_below(chosen, _nucleus_border(chosen, mass))


def _nucleus_border(scores: Tensor, mass: Tensor) -> Tensor:
    """The smallest score [R, 1] that belongs to the nucleus of each row."""
    normaliser = scores.logsumexp(-1, keepdim=True)
    for width in (*_nucleus_widths(scores), scores.shape[1]):
        largest = scores.topk(width).values
        probabilities = (largest - normaliser).exp()
        cumulative = probabilities.cumsum(-1)
        if width == scores.shape[1] or bool((cumulative[:, -1:] >= mass).all()):
            break
    inside = cumulative - probabilities < mass
    return largest.gather(1, inside.sum(-1, keepdim=True).sub_(1).clamp_min_(0))


def _nucleus_widths(scores: Tensor) -> tuple[int, ...]:
    """A GPU sorts all at once: to look whether a part suffices would wait for it."""
    if scores.device.type != "cpu":
        return ()
    return tuple(width for width in _NUCLEUS_WIDTHS if width < scores.shape[1])


def _limit_min_p(scores: Tensor, ratios: list[float]) -> None:
    """Keeps tokens at least min_p times as likely as the likeliest one."""
    if any(ratios):
        border = scores.amax(-1, keepdim=True) + _column(ratios, scores).log()
        scores.copy_(_drop_below(scores, border))


def _drop_below(scores: Tensor, border: Tensor) -> Tensor:
    return scores.masked_fill(scores < border, float("-inf"))


def _logprobs(
    logits: Tensor, tokens: Tensor, sequences: Rows[Sequence]
) -> dict[int, TokenLogprobs]:
    """Of the rows that want them: log-probabilities of the model itself, before any edit."""
    wanted = {
        row: sequence.sampling.logprobs
        for row, sequence in enumerate(sequences)
        if sequence.sampling.logprobs is not None
    }
    if not wanted:
        return {}
    rows = to_device(np.array(list(wanted)), logits.device)
    table = logits[rows].log_softmax(-1)
    chosen_ids = tokens[rows]
    chosen = table.gather(1, chosen_ids[:, None])[:, 0]
    top = table.topk(max(wanted.values()))
    columns = zip(
        wanted.items(),
        chosen_ids.tolist(),
        chosen.tolist(),
        top.indices.tolist(),
        top.values.tolist(),
        strict=True,
    )
    return {
        row: TokenLogprobs(
            Logprob(token_id, logprob), tuple(map(Logprob, ids[:count], values[:count]))
        )
        for (row, count), token_id, logprob, ids, values in columns
    }
