"""Operations that are recorded once and done again for other numbers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as f

from deltamux.engine.replay.recording import CannotRecord, Recording
from deltamux.engine.replay.scratch import Scratch
from deltamux_kernels import native, rms_norm
from deltamux_kernels.native.panels import Panels

ROWS, WIDTH = 3, 32
WEIGHT = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))


def _filled(x: Tensor) -> Tensor:
    """In memory that others have written into since."""
    sums = x.new_zeros(ROWS, WIDTH)
    sums[1:] += x[1:]
    return sums


def _into_memory_without_numbers(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:2].copy_(x[:2])
    return y.index_copy_(0, torch.arange(1) + 2, x[:1])


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "with a form for given memory": lambda x: x + 2 * x,
    "without one": lambda x: f.layer_norm(x, (WIDTH,)),
    "two results": lambda x: torch.cat([part.float() for part in x.topk(4)], dim=1),
    "parts": lambda x: torch.stack(x.t().reshape(2, -1).split(5, dim=1)[:2]),
    "another type": lambda x: (x.bfloat16() @ WEIGHT.bfloat16()).float(),
    "a linear layer": lambda x: f.linear(x, WEIGHT, x[0]),
    "attention": lambda x: f.scaled_dot_product_attention(x, x, x),
    "a table": lambda x: f.embedding(x[:, 0].abs().long(), WEIGHT),
    "places": lambda x: x[x[:, 0].abs().long().clamp(max=ROWS - 1)],
    "a choice": lambda x: torch.where(x > 0, x, x.roll(1, 0)),
    "in place": lambda x: x.clone().mul_(3).add_(x),
    "filled": _filled,
    "not filled": _into_memory_without_numbers,
    "dropout at rest": lambda x: f.dropout(x, 0.5, training=False).exp(),
    "sparse": lambda x: (SPARSE @ x.t()).t(),
}
SPARSE = (WEIGHT * (WEIGHT > 1)).to_sparse_csr()

REFUSED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "truth": lambda x: bool((x > 0).any()),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy().sum(),
    "array": lambda x: np.asarray(x),
    "equal": lambda x: torch.equal(x, x),
    "close": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "one hot": lambda x: f.one_hot(x[:, 0].abs().long()),
    "numbers of the host": lambda x: x + torch.tensor([1.0] * WIDTH),
    "another shape in place": lambda x: (x + 1).t_() * 2,
    "random": lambda x: x + torch.rand(WIDTH),
    "dropout": lambda x: f.dropout(x, 0.5),
    "another layout": lambda x: x.to_sparse_csr(),
}


def numbers(seed: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture(params=["inference", "no_grad"], autouse=True)
def mode(request: pytest.FixtureRequest) -> object:
    with torch.inference_mode() if request.param == "inference" else torch.no_grad():
        yield


def check(operation: Callable[[Tensor], Tensor]) -> Recording:
    """Recorded for some numbers, and replayed for others."""
    x, recording = numbers(1).clone(), Recording(Scratch(1 << 26))
    with recording.record():
        y = operation(x)
    assert torch.equal(y, operation(x))
    for seed in (2, 3):
        x.copy_(numbers(seed))
        # Memory of nobody is somebody else's meanwhile.
        gc.collect()
        _ = [torch.full((ROWS, WIDTH), torch.nan) for _ in range(50)]
        recording.replay()
        assert torch.equal(y, operation(x))
    return recording


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_of_torch(name: str) -> None:
    assert check(OPERATIONS[name]).calls


@pytest.mark.skipif(not native.available(), reason="needs a C compiler")
def test_operations_in_c_between_others() -> None:
    norm, matrix = torch.rand(WIDTH), Panels(WEIGHT)
    recording = check(lambda x: matrix.product(rms_norm(x * 2, norm, 1e-5)) + x)
    # Making memory is none, and neighbours in C are one.
    assert len(recording.calls) == 3


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_host_may_decide_by_is_refused(name: str) -> None:
    x = numbers(1)
    with pytest.raises(CannotRecord), Recording(Scratch(1 << 26)).record():
        REFUSED[name](x)


def test_recordings_share_their_memory() -> None:
    """One after the other, whatever they were recorded with."""
    scratch = Scratch(1 << 26)
    steps = []
    for seed, operation in enumerate(OPERATIONS.values()):
        x, recording = numbers(seed).clone(), Recording(scratch)
        with recording.record():
            y = operation(x)
        steps.append((operation, x, recording, y))
    taken = scratch.bytes
    assert taken == 4 << 20
    for seed, (operation, x, recording, y) in enumerate(steps, start=9):
        x.copy_(numbers(seed))
        recording.replay()
        assert torch.equal(y, operation(x))
    assert scratch.bytes == taken


def test_what_takes_more_memory_than_there_is_is_refused() -> None:
    """Results that lie in a piece each, and in one of their own."""
    for result in (4 << 20, 5 << 20):
        for most, fits in ((3 * result, True), (3 * result - 1, False)):
            x, recording = torch.ones(result, dtype=torch.uint8), Recording(Scratch(most))
            with nullcontext() if fits else pytest.raises(CannotRecord), recording.record():
                y = (x + 1) * 2 + 3
            if fits:
                x.fill_(2)
                recording.replay()
                assert (y == 9).all()


def test_views_are_no_operations() -> None:
    x, recording = numbers(1), Recording(Scratch(1 << 26))
    with recording.record():
        x.t()[2:].unsqueeze(0).flatten(1).detach()
    # One copies, since it cannot be a view.
    assert len(recording.calls) == 1


def test_nothing_is_recorded_outside() -> None:
    x, recording = numbers(1), Recording(Scratch(1 << 26))
    with pytest.raises(ZeroDivisionError), recording.record():
        _ = x * (1 // 0)
    f.linear(x, WEIGHT)
    if native.available():
        Panels(WEIGHT).product(x)
    assert not recording.calls
