"""One step on a tiny model: outcomes, poisoned rows, seeds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import Base, adopt
from deltamux.engine.flight import Flight
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.outcome import NonFinite, SampledToken
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.step.runner import ModelRunner
from deltamux.wire.messages import Sampling

BLOCK, BLOCKS = 4, 40
# Its embedding is NaN: a prompt that holds it poisons its own row and its own keys and values.
POISON = 5
GREEDY = Sampling()
SEEDED = Sampling(temperature=1.0, top_p=0.95, seed=11, logprobs=0)


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    return adopt(model)


@pytest.fixture
def runner(base: Base) -> ModelRunner:
    cache = KVCache(base.layers, BLOCKS, BLOCK, base.dtype, base.device)
    return ModelRunner(base, cache, Rows(base.device))


@pytest.fixture
def blocks() -> Iterator[int]:
    return iter(range(1, BLOCKS))


def sequence(
    prompt: list[int], blocks: Iterator[int], sampling: Sampling = GREEDY, index: int = 0
) -> Sequence:
    """With blocks for 16 tokens."""
    return trial_sequence(index, prompt, [next(blocks) for _ in range(4)], sampling)


def step(runner: ModelRunner, *sequences: Sequence) -> list[SampledToken | NonFinite]:
    """Everything uncomputed at once; tokens are appended as the engine does it."""
    outcomes = runner.run([Scheduled(s, s.num_uncomputed) for s in sequences])
    for item, outcome in zip(sequences, outcomes, strict=True):
        item.num_computed = item.num_places
        if isinstance(outcome, SampledToken):
            item.tokens.append(outcome.token_id)
    return outcomes


def token(outcome: SampledToken | NonFinite) -> int:
    assert isinstance(outcome, SampledToken)
    return outcome.token_id


def test_outcomes_come_in_the_order_of_the_schedule(
    runner: ModelRunner, blocks: Iterator[int]
) -> None:
    prompts = [[9, 10, 11], [12, 13], [14, 15, 16, 17]]
    alone = [token(step(runner, sequence(prompt, blocks))[0]) for prompt in prompts]
    together = [
        sequence(prompt, iter(range(1 + 4 * i, 9 + 4 * i))) for i, prompt in enumerate(prompts)
    ]
    # Slots turn the rows around; none of these slots holds an adapter.
    together[0].slot, together[2].slot = 3, 1
    unfinished = sequence([18, 19, 20], iter(range(20, 24)))
    scheduled = [Scheduled(s, s.num_uncomputed) for s in together]
    scheduled.insert(1, Scheduled(unfinished, 2))
    assert [token(outcome) for outcome in runner.run(scheduled)] == alone


def test_rows_tell_the_sites_who_is_where(base: Base, blocks: Iterator[int]) -> None:
    rows = Rows(base.device)
    cache = KVCache(base.layers, BLOCKS, BLOCK, base.dtype, base.device)
    adapted, plain = sequence([1, 2, 3], blocks), sequence([4], blocks)
    adapted.slot = 2
    ModelRunner(base, cache, rows).run([Scheduled(plain, 1), Scheduled(adapted, 3)])
    assert rows.tokens.spans == ((2, 0, 3),)
    assert rows.sampled.spans == ((2, 0, 1),)


def test_runner_changes_no_sequence(runner: ModelRunner, blocks: Iterator[int]) -> None:
    item = sequence([7, 8, 9], blocks)
    before = copy.deepcopy(vars(item))
    runner.run([Scheduled(item, 3)])
    assert vars(item) == before


def test_step_in_which_nothing_samples_fills_the_cache(
    runner: ModelRunner, blocks: Iterator[int]
) -> None:
    prompt = [7, 8, 9, 10, 11]
    whole = token(step(runner, sequence(prompt, blocks))[0])
    chunked = sequence(prompt, blocks)
    assert runner.run([Scheduled(chunked, 3)]) == []
    chunked.num_computed = 3
    assert token(step(runner, chunked)[0]) == whole


def test_rows_behind_shared_blocks_are_exact(runner: ModelRunner, blocks: Iterator[int]) -> None:
    """The second sequence begins with the blocks that the first has computed, in chunks."""

    def logits(item: Sequence, chunk: int) -> torch.Tensor:
        parts = []
        while item.num_uncomputed:
            scheduled = Scheduled(item, min(chunk, item.num_uncomputed))
            batch = runner.batch([scheduled])
            parts.append(runner.forward(batch, torch.arange(scheduled.num_tokens)))
            item.num_computed += scheduled.num_tokens
        return torch.cat(parts)

    common = [7, 8, 9, 10, 11, 12, 13, 14]
    alone = logits(sequence([*common, 20, 21, 22], blocks), 100)
    first = sequence([*common, 30], blocks)
    logits(first, 3)
    second = sequence([*common, 20, 21, 22], chain(first.blocks[:2], blocks))
    second.num_computed = 8
    torch.testing.assert_close(logits(second, 100), alone[8:], atol=1e-5, rtol=1e-5)


def test_poisoned_row_is_reported_and_its_neighbours_are_untouched(
    runner: ModelRunner, blocks: Iterator[int]
) -> None:
    def outcomes(third: int) -> list[SampledToken | NonFinite]:
        items = [sequence([8, 9, token], blocks, SEEDED) for token in (7, third, 12)]
        return step(runner, *items)

    clean, poisoned = outcomes(13), outcomes(POISON)
    assert poisoned[1] == NonFinite()
    assert [poisoned[0], poisoned[2]] == [clean[0], clean[2]]


def test_blocks_of_a_poisoned_sequence_serve_the_next_one(
    runner: ModelRunner, blocks: Iterator[int]
) -> None:
    victim = [9, 10, 11, 12, 13]
    expected = step(runner, sequence(victim, blocks, SEEDED))
    culprit = sequence([8, *[POISON] * 14], blocks)
    assert step(runner, culprit) == [NonFinite()]
    reused = sequence(victim, iter(culprit.blocks), SEEDED)
    assert step(runner, reused) == expected
    # Beside a longer neighbour, whose length the gathered pages are padded to.
    beside = [sequence([20] * 15, blocks), sequence(victim, iter(culprit.blocks), SEEDED)]
    assert token(step(runner, *beside)[1]) == token(expected[0])
    assert isinstance(step(runner, *beside)[1], SampledToken)


def test_seed_gives_the_same_tokens_alone_in_company_and_after_preemption(
    runner: ModelRunner, blocks: Iterator[int]
) -> None:
    prompt = [9, 10, 11]
    alone = sequence(prompt, blocks, SEEDED)
    for _ in range(8):
        step(runner, alone)

    preempted = sequence(prompt, blocks, SEEDED)
    others = [
        sequence([30 + i] * (i + 2), blocks, Sampling(temperature=1.0, seed=i)) for i in range(3)
    ]
    for number in range(8):
        if number == 5:
            preempted.num_computed = 0
        step(runner, *others[: number % 4], preempted)
    assert preempted.tokens == alone.tokens


def test_choices_of_one_seed_differ(runner: ModelRunner, blocks: Iterator[int]) -> None:
    hot = Sampling(temperature=2.0, seed=3)
    choices = [sequence([9, 10, 11], blocks, hot, index) for index in range(3)]
    for _ in range(6):
        step(runner, *choices)
    assert len({tuple(choice.tokens) for choice in choices}) == 3


def test_steps_launched_ahead_give_what_they_give_one_by_one(
    runner: ModelRunner, blocks: Iterator[int]
) -> None:
    """The tokens of a launch are appended when the next one has been made of them."""

    def sequences() -> list[Sequence]:
        prompts = ([9, 10, 11], [12, 13], [14, 15, 16, 17])
        samplings = (GREEDY, SEEDED, Sampling(temperature=1.0, top_k=9, seed=3))
        pairs = zip(prompts, samplings, strict=True)
        return [sequence(prompt, blocks, sampling) for prompt, sampling in pairs]

    one_by_one, ahead = sequences(), sequences()
    for _ in range(6):
        step(runner, *one_by_one)
    behind = None
    for number in range(6):
        # In another order every time.
        ahead = [*ahead[1:], ahead[0]]
        flight = Flight.launch(runner, [Scheduled(s, s.num_uncomputed) for s in ahead])
        assert {item.sequence.num_coming for item in flight.scheduled} == {1 + (number > 0)}
        if behind is not None:
            arrive(behind)
        behind = flight
    arrive(behind)
    assert [s.tokens for s in ahead] == [s.tokens for s in one_by_one]


def arrive(flight: Flight) -> None:
    for item, outcome in zip(flight.scheduled, flight.land(), strict=True):
        item.sequence.num_computed += item.num_tokens
        item.sequence.tokens.append(token(outcome))
