"""What a decode step sends: to the front end, to the device, and to itself in the step after."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deltamux.engine.sampling import sampler
from deltamux.engine.transfer import Upload, to_device
from deltamux.wire.messages import Sampling, StepDone
from deltamux_kernels import Segments

MAX_ADAPTERS = 16
# A sequence's token id, position, place in the KV cache and row of logits, 8 bytes each; its
# length, where its rows end, and its one block, 4 bytes each.
BYTES_OF_A_SEQUENCE = 4 * 8 + 3 * 4
# Where the first sequence's rows start.
BYTES_OF_A_STEP = 4
# Temperature, number drawn, share of the probability that may go; how many logits top_k leaves out.
BYTES_OF_A_DRAW = 4 + 8 + 4 + 8
# All arrays of a step go as one.
COPIES_OF_A_STEP, COPIES_OF_A_DRAW = 1, 4

MIXES = {"base": [None] * 5, "one": [0], "mixed": [None, *range(5)], "16": range(MAX_ADAPTERS)}
mixes = pytest.mark.parametrize("adapters", MIXES.values(), ids=MIXES)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each copy to the device."""
    sizes: list[int] = []
    send = Upload.send

    def counted(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
        sizes.append(array.nbytes)
        return to_device(array, device)

    def counted_send(upload: Upload, arrays: list[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
        sizes.append(sum(array.nbytes for array in arrays))
        return send(upload, arrays)

    monkeypatch.setattr(sampler, "to_device", counted)
    monkeypatch.setattr(Upload, "send", counted_send)
    return sizes


@mixes
def test_one_message_a_step(engine, adapters) -> None:
    engine.decode(adapters)
    for _ in range(3):
        (message,) = engine.step().messages
        assert isinstance(message, StepDone)
        assert len(message.progress) == len(adapters)


@mixes
def test_what_goes_to_the_device_is_a_few_bytes_of_each_sequence(engine, sent, adapters) -> None:
    engine.decode(adapters)
    sent.clear()
    engine.step()
    assert len(sent) == COPIES_OF_A_STEP
    assert sum(sent) <= len(adapters) * BYTES_OF_A_SEQUENCE + BYTES_OF_A_STEP


def test_sampling_sends_a_few_numbers_of_each_sequence_more(engine, sent) -> None:
    engine.decode(range(5), Sampling(temperature=0.8, top_p=0.9, top_k=20, seed=1))
    sent.clear()
    engine.step()
    assert len(sent) <= COPIES_OF_A_STEP + COPIES_OF_A_DRAW
    assert sum(sent) <= 5 * (BYTES_OF_A_SEQUENCE + BYTES_OF_A_DRAW) + BYTES_OF_A_STEP


@mixes
def test_the_step_after_rebuilds_no_work_list(engine, monkeypatch, adapters) -> None:
    """Nothing of the host's becomes a tensor on behalf of adapters, and torch does the same."""
    engine.decode([None] * len(adapters))
    base = engine.step()
    engine.decode(adapters)
    first, second = engine.step(), engine.step()
    assert first.from_host == second.from_host == base.from_host
    assert first.operations == second.operations


def test_the_step_after_finds_its_segments(engine, monkeypatch) -> None:
    build, built = Segments.build, []

    def seen(*args: Any) -> Segments:
        built.append(build(*args))
        return built[-1]

    engine.decode([*range(7), None])
    monkeypatch.setattr(Segments, "build", seen)
    engine.step()
    engine.step()
    # All rows are sampled: there is nothing else to build.
    tokens, tokens_again = built
    assert tokens_again is tokens
