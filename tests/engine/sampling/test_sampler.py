"""Sampling held to transformers' logits processors and to exact distributions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Items

import pytest
import torch
import transformers.generation.logits_process as reference
from msgspec.structs import replace
from torch import Tensor

from deltamux.engine.outcome import NonFinite, SampledToken
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sampling import sampler
from deltamux.engine.sampling.logit_edits import edit_logits
from deltamux.engine.sampling.sampler import Drawn, filter_scores, uniform
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.transfer import Download
from deltamux.wire.messages import Sampling, Stopping

VOCABULARY = 5000
PROMPT, GENERATED = [3, 7, 7, 11], [20, 21, 20]


def sequence(
    sampling: Sampling,
    generated: Items[int] = (),
    index: int = 0,
    min_tokens: int = 0,
    stop: tuple[int, ...] = (),
) -> Sequence:
    made = trial_sequence(index, PROMPT, [], sampling)
    made.tokens += generated
    made.stopping = Stopping(max_tokens=100, min_tokens=min_tokens, stop_token_ids=stop)
    return made


def random_logits(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def tokens_of(outcomes: list[SampledToken | NonFinite]) -> list[int]:
    assert all(isinstance(outcome, SampledToken) for outcome in outcomes)
    return [outcome.token_id for outcome in outcomes if isinstance(outcome, SampledToken)]


def shares(sequences: Items[Sequence]) -> list[Scheduled]:
    return [Scheduled(sequence, sequence.num_uncomputed) for sequence in sequences]


def sample(logits: Tensor, sequences: Items[Sequence]) -> Drawn:
    return sampler.sample(logits, shares(sequences)).wait()


FILTERS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=1),
    Sampling(temperature=1.0, top_k=40),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=2.5, top_p=0.999),
    Sampling(temperature=0.3, top_p=0.05),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.5, top_k=60, top_p=0.8, min_p=0.02),
    Sampling(temperature=1.0, top_k=VOCABULARY + 1),
]


def filtered_by_transformers(scores: Tensor, sampling: Sampling) -> Tensor:
    """The warpers of generate for one row [1, V], in generate's order."""
    warpers = [reference.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(reference.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(reference.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(reference.MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        scores = warper(torch.empty(1, 0, dtype=torch.long), scores)
    return scores


def test_filters_of_a_mixed_batch_are_those_of_transformers() -> None:
    logits = random_logits(len(FILTERS))
    kept = filter_scores(logits, FILTERS)
    for row, sampling in enumerate(FILTERS):
        expected = filtered_by_transformers(logits[row : row + 1], sampling)
        torch.testing.assert_close(kept[row : row + 1], expected)


def test_penalties_are_those_of_transformers_and_of_openai() -> None:
    logits = random_logits(4)
    sequences = [
        sequence(Sampling(repetition_penalty=1.7), GENERATED),
        sequence(Sampling(presence_penalty=0.5, frequency_penalty=0.25), GENERATED),
        sequence(Sampling(logit_bias={5: 2.0, 20: -1.0})),
        sequence(Sampling()),
    ]
    edited = edit_logits(logits, shares(sequences))

    ids = torch.tensor([PROMPT + GENERATED])
    penalised = reference.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits[:1].clone())
    torch.testing.assert_close(edited[:1], penalised)
    expected = logits.clone()
    expected[1, 20] -= 0.5 + 2 * 0.25
    expected[1, 21] -= 0.5 + 0.25
    expected[2, 5] += 2.0
    expected[2, 20] -= 1.0
    torch.testing.assert_close(edited[1:], expected[1:])


def test_stop_tokens_are_held_back_until_min_tokens() -> None:
    logits = torch.zeros(2, 8)
    logits[:, 4] = 9
    logits[:, 6] = 5
    early = sequence(Sampling(), [1], min_tokens=2, stop=(4,))
    late = sequence(Sampling(), [1, 2], min_tokens=2, stop=(4,))
    assert tokens_of(sample(logits, [early, late])) == [6, 4]


def test_stop_tokens_outside_the_vocabulary_are_nothing_to_hold_back() -> None:
    """The end token of some models is such a one."""
    logits = torch.zeros(1, 8)
    logits[0, 7] = 9
    logits[0, 4] = 5
    early = sequence(Sampling(), [1], min_tokens=2, stop=(4, 8, 50256, -1))
    assert tokens_of(sample(logits, [early])) == [7]


def test_edits_of_one_row_leave_the_others_and_the_input_alone() -> None:
    logits = random_logits(3)
    before = logits.clone()
    plain = sequence(Sampling())
    edited = edit_logits(logits, shares([plain, sequence(Sampling(repetition_penalty=3.0)), plain]))
    assert torch.equal(logits, before)
    assert torch.equal(edited[[0, 2]], before[[0, 2]])
    assert not torch.equal(edited[1], before[1])
    assert edit_logits(logits, shares([plain] * 3)) is logits


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = random_logits(3)
    greedy = sequence(Sampling())
    only_one = sequence(Sampling(temperature=1.0, top_k=1, seed=5))
    assert tokens_of(sample(logits, [greedy, only_one, greedy])) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0), Sampling(temperature=1.5, top_k=6, top_p=0.9)]
)
def test_frequencies_follow_the_distribution(sampling: Sampling) -> None:
    logits = random_logits(1, 12)
    draws = 4000
    sequences = [sequence(replace(sampling, seed=seed)) for seed in range(draws)]
    counts = Counter(tokens_of(sample(logits.expand(draws, -1), sequences)))
    expected = filter_scores(logits, [sampling])[0].softmax(-1)
    for token, probability in enumerate(expected.tolist()):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) <= 5 * deviation
        assert probability > 0 or counts[token] == 0


def test_seed_gives_the_same_token_in_any_batch() -> None:
    logits = random_logits(6)
    mine = sequence(Sampling(temperature=1.0, top_p=0.95, seed=42), GENERATED)
    others = [sequence(Sampling(temperature=1.0, seed=seed, top_k=seed * 10)) for seed in range(5)]
    alone = tokens_of(sample(logits[:1], [mine]))[0]
    assert tokens_of(sample(logits, [mine, *others]))[0] == alone
    moved = torch.cat((logits[1:], logits[:1]))
    assert tokens_of(sample(moved, [*others, mine]))[-1] == alone


def test_seed_choice_and_place_each_change_the_number() -> None:
    numbers = {
        uniform(seed, choice, place)
        for seed in (0, 1, 2**63 - 1)
        for choice in range(4)
        for place in range(50)
    }
    assert len(numbers) == 600
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / 600 == pytest.approx(0.5, abs=0.06)
    # Written down: a change of the hash would change every seeded answer.
    assert uniform(42, 0, 0) == pytest.approx(0.14742400749245022, abs=1e-12)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(3)
    table = logits.log_softmax(-1)
    wanting = Sampling(temperature=0.5, seed=1, logprobs=3, repetition_penalty=2.0)
    outcomes = sample(
        logits,
        [
            sequence(Sampling()),
            sequence(wanting, GENERATED),
            sequence(Sampling(logprobs=0)),
        ],
    )
    nothing, full, chosen_only = (
        outcome.logprobs for outcome in outcomes if isinstance(outcome, SampledToken)
    )
    assert nothing is None
    assert full is not None and chosen_only is not None
    assert full.chosen.logprob == pytest.approx(table[1, full.chosen.token_id].item())
    best = table[1].topk(3)
    assert [entry.token_id for entry in full.top] == best.indices.tolist()
    assert [entry.logprob for entry in full.top] == pytest.approx(best.values.tolist())
    assert chosen_only.top == ()
    assert chosen_only.chosen.token_id == logits[2].argmax().item()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), FILTERS[-2]])
def test_only_the_row_that_is_not_finite_is_reported(poison: float, sampling: Sampling) -> None:
    logits = random_logits(3)
    sequences = [sequence(replace(sampling, seed=3, logprobs=2)) for _ in range(3)]
    clean = sample(logits, sequences)
    logits[1, 17] = poison
    poisoned = sample(logits, sequences)
    assert poisoned[1] == NonFinite()
    assert [poisoned[0], poisoned[2]] == [clean[0], clean[2]]


def test_ties_at_the_border_stay() -> None:
    """16-bit models give equal logits often; none of them is favoured."""
    scores = torch.tensor([[1.0, 5.0, 3.0, 3.0, 3.0]])
    kept = filter_scores(scores, [Sampling(temperature=1.0, top_k=2)])
    assert kept.isfinite().tolist() == [[False, True, True, True, True]]


def test_no_rows_give_no_tokens_but_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of nothing but the middle of prompts is over when it has been collected, too."""
    wait, waited = Download.wait, []
    monkeypatch.setattr(Download, "wait", lambda self: waited.append(self) or wait(self))
    draw = sampler.sample(torch.empty(0, 8), [])
    assert not waited
    assert draw.wait() == []
    assert len(waited) == 1
