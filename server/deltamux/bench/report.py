"""Turns outcomes into the figures people compare, under the JSON keys of vLLM's benchmark."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltamux.bench.driver import Outcome

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Objective:
    """A service-level objective: an answer is good when it keeps every limit (milliseconds)."""

    limits: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Reads "ttft:200,itl:50,e2el:2000"; raises ValueError otherwise."""
        limits: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition(":")
            if name not in {"ttft", "itl", "e2el"} or name in limits:
                raise ValueError(f"{name} is none of ttft, itl and e2el, or there twice")
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = math.nan
            if not 0 < limits[name] < math.inf:
                raise ValueError(f"expected milliseconds behind {name}:")
        return cls(limits)

    def met_by(self, outcome: Outcome) -> bool:
        measured = {
            "ttft": outcome.first_token,
            "itl": float(np.mean(outcome.inter_token)) if outcome.inter_token else 0.0,
            "e2el": outcome.latency,
        }
        return all(measured[name] * 1000 <= limit for name, limit in self.limits.items())


def summarize(outcomes: list[Outcome], duration: float, objective: Objective) -> dict[str, Any]:
    """Figures of one run: times in milliseconds, throughputs per second of `duration`.

    `hot` and `cold` repeat the latency figures for requests whose adapter was, or was not, on the
    device when they were admitted; no request is in either when the server does not say.
    """
    done = [o for o in outcomes if not o.error]
    output_tokens = sum(o.output_tokens for o in done)
    input_tokens = sum(o.prompt_tokens for o in done)
    good = sum(objective.met_by(o) for o in done)
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "errors_by_code": dict(Counter(o.error for o in outcomes if o.error)),
        "error_messages": {o.error: o.message for o in outcomes if o.error},
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
        **_latencies(done),
        "hot": _completed([o for o in done if o.hot is True]),
        "cold": _completed([o for o in done if o.hot is False]),
        "input_lens": [o.prompt_tokens for o in outcomes],
        "output_lens": [o.output_tokens for o in outcomes],
        "ttfts": [o.first_token for o in outcomes],
        "itls": [o.inter_token for o in outcomes],
        "e2els": [o.latency for o in outcomes],
        "errors": [o.error for o in outcomes],
    }


def _completed(outcomes: list[Outcome]) -> dict[str, float]:
    return {"completed": len(outcomes), **_latencies(outcomes)}


def _latencies(outcomes: list[Outcome]) -> dict[str, float]:
    series = {
        "ttft": [o.first_token for o in outcomes],
        "tpot": [float(np.mean(o.inter_token)) for o in outcomes if o.inter_token],
        "itl": [gap for o in outcomes for gap in o.inter_token],
        "e2el": [o.latency for o in outcomes],
    }
    return {
        f"{figure}_{name}_ms": value
        for name, seconds in series.items()
        for figure, value in _figures(np.array(seconds) * 1000).items()
    }


def _figures(values: np.ndarray[Any, Any]) -> dict[str, float]:
    if values.size == 0:
        return {}
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "std": float(values.std()),
        **percentiles,
    }
