"""Rows of unlike vocabularies in one step: each is sampled as if the others were not there."""

from __future__ import annotations

import pytest
import torch

from deltamux.adapters.traits import Traits
from deltamux.engine.outcome import NonFinite, SampledToken
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sampling.sampler import sample
from deltamux.engine.sampling.vocabularies import sample_own
from deltamux.engine.sequence import Scheduled
from deltamux.wire.messages import Sampling

KNOWN, WIDTH = 50, 57
# By row: tokens of its adapter's vocabulary, 0 for the base's.
SIZES = [0, 53, 0, WIDTH, 46, 0, 53]
SAMPLINGS = [
    Sampling(logprobs=3),
    Sampling(temperature=100.0, seed=5, logprobs=20),
    Sampling(temperature=1.0, top_k=40, seed=6),
    Sampling(temperature=0.8, top_p=0.9, seed=7, logprobs=0),
    Sampling(temperature=2.0, min_p=0.01, seed=8),
    Sampling(repetition_penalty=1.4, presence_penalty=1.0, logit_bias={3: 90.0}),
]


def shares(shift: int) -> list[Scheduled]:
    made = []
    for row, size in enumerate(SIZES):
        sampling = SAMPLINGS[(row + shift) % len(SAMPLINGS)]
        sequence = trial_sequence(row, [1, 2, 3], [], sampling)
        sequence.traits = Traits(vocab_size=size)
        made.append(Scheduled(sequence, 3))
    return made


@pytest.mark.parametrize("shift", range(len(SAMPLINGS)))
def test_a_row_sees_the_columns_of_its_own_vocabulary_alone(shift: int) -> None:
    """Whatever stands behind them: here it is what any row would choose, or not a number."""
    logits = torch.randn(len(SIZES), WIDTH, generator=torch.Generator().manual_seed(shift))
    rows = shares(shift)
    for row, size in enumerate(SIZES):
        logits[row, size or KNOWN :] = float("nan") if row % 2 else 1e4
    outcomes = sample_own(logits, rows, KNOWN).wait()
    for row, size in enumerate(SIZES):
        alone = sample(logits[row : row + 1, : size or KNOWN].contiguous(), rows[row : row + 1])
        assert outcomes[row] == alone.wait()[0]
        assert isinstance(outcomes[row], SampledToken)


def test_added_tokens_are_sampled_where_they_are_known() -> None:
    logits = torch.zeros(len(SIZES), WIDTH)
    logits[:, 52] = 9.0
    draw = sample_own(logits, shares(0), KNOWN)
    tokens = [o.token_id for o in draw.wait()]
    assert draw.tokens.tolist() == tokens
    greedy = [row for row, s in enumerate(shares(0)) if s.sequence.sampling.temperature == 0]
    assert {row: tokens[row] == 52 for row in greedy} == {0: False, 5: False, 6: True}


def test_only_a_rows_own_columns_can_poison_it() -> None:
    logits = torch.zeros(3, WIDTH)
    logits[:, 52] = float("inf")
    rows = shares(0)[:3]
    kinds = [type(outcome) for outcome in sample_own(logits, rows, KNOWN).wait()]
    assert kinds == [SampledToken, NonFinite, SampledToken]


def test_a_small_vocabulary_has_fewer_alternatives_than_are_asked_for() -> None:
    row = trial_sequence(0, [1], [], Sampling(logprobs=20))
    row.traits = Traits(vocab_size=4)
    (outcome,) = sample_own(torch.randn(1, KNOWN), [Scheduled(row, 1)], KNOWN).wait()
    assert isinstance(outcome, SampledToken) and outcome.logprobs is not None
    assert sorted(top.token_id for top in outcome.logprobs.top) == [0, 1, 2, 3]
