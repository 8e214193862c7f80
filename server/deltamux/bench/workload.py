"""Seeded workloads: when each request is due, which adapter it names, how long it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Ids below this are left alone: tokenizers keep their special tokens there.
FIRST_PLAIN_ID = 16


@dataclass(frozen=True)
class Lengths:
    """Token counts drawn uniformly from low .. high, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Reads "128" or "32:256"; raises ValueError otherwise."""
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high if colon else low))
        except ValueError:
            lengths = cls(0, 0)
        if not 0 < lengths.low <= lengths.high:
            raise ValueError("expected a number of tokens, or LOW:HIGH, from 1 on and rising")
        return lengths

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        return [int(n) for n in rng.integers(self.low, self.high + 1, count)]


@dataclass(frozen=True)
class PlannedRequest:
    """One request of the plan; `due` is seconds after the start."""

    due: float
    adapter: str
    prompt: tuple[int, ...]
    max_tokens: int


def arrivals(rng: np.random.Generator, count: int, rate: float, burstiness: float) -> list[float]:
    """Due times of an open-loop process with `rate` requests a second.

    Gaps follow a gamma distribution of shape `burstiness` and mean 1 / rate: 1 is Poisson, less is
    burstier, more is steadier. An infinite rate makes all requests due at once.
    """
    if np.isinf(rate):
        return [0.0] * count
    gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), count)
    return [float(t) for t in np.cumsum(gaps) - gaps[0]]


Popularity = Callable[[np.random.Generator, int, int], list[int]]


def popularity(name: str) -> Popularity:
    """How requests choose among `n` adapters: identical, distinct, uniform or zipf:A.

    The names are Punica's (Chen et al. 2023): all the same, round robin, independent and uniform,
    or independent with probability of the k-th proportional to k ** -A.
    """
    kind, colon, exponent = name.partition(":")
    if kind == "zipf":
        return _zipf(_exponent(exponent) if colon else 1.0)
    if name == "identical":
        return lambda rng, n, count: [0] * count
    if name == "distinct":
        return lambda rng, n, count: [i % n for i in range(count)]
    if name == "uniform":
        return lambda rng, n, count: [int(i) for i in rng.integers(0, n, count)]
    raise ValueError("expected identical, distinct, uniform or zipf:A")


def _exponent(text: str) -> float:
    try:
        exponent = float(text)
    except ValueError:
        exponent = math.nan
    if not 0 <= exponent < math.inf:
        raise ValueError("expected a number for A of zipf:A, from 0 on")
    return exponent


def _zipf(exponent: float) -> Popularity:
    def choose(rng: np.random.Generator, n: int, count: int) -> list[int]:
        weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
        return [int(i) for i in rng.choice(n, count, p=weights / weights.sum())]

    return choose


@dataclass(frozen=True)
class Workload:
    """Everything that decides the requests of one run, so that a seed repeats it exactly."""

    adapters: tuple[str, ...]
    requests: int
    rate: float
    burstiness: float = 1.0
    popularity: str = "uniform"
    prompt_lengths: Lengths = Lengths(128, 128)
    output_lengths: Lengths = Lengths(64, 64)
    vocab_size: int = 256
    seed: int = 0

    def plan(self) -> list[PlannedRequest]:
        rng = np.random.default_rng(self.seed)
        names = self.adapters or ("",)
        chosen = popularity(self.popularity)(rng, len(names), self.requests)
        due = arrivals(rng, self.requests, self.rate, self.burstiness)
        prompts = self.prompt_lengths.draw(rng, self.requests)
        outputs = self.output_lengths.draw(rng, self.requests)
        return [
            PlannedRequest(due[i], names[chosen[i]], self._prompt(rng, prompts[i]), outputs[i])
            for i in range(self.requests)
        ]

    def _prompt(self, rng: np.random.Generator, length: int) -> tuple[int, ...]:
        ids = rng.integers(min(FIRST_PLAIN_ID, self.vocab_size - 1), self.vocab_size, length)
        return tuple(int(i) for i in ids)
