"""`deltamux bench`: an open-loop load on a running server, its figures and its picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from deltamux.bench.backend import Backend, BackendError
from deltamux.bench.grpc_backend import GrpcBackend
from deltamux.bench.report import Objective
from deltamux.bench.run import BenchConfig, run
from deltamux.bench.workload import Lengths, Workload, popularity
from deltamux.cli.command import Command, UsageError, option
from deltamux.cli.tables import console
from deltamux.client import DEFAULT_TARGET


def _rate(word: str) -> float:
    try:
        rate = float(word)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise ValueError("expected a positive number, or inf")
    return rate


def _read_by(read: Callable[[str], Any]) -> AfterValidator:
    """Keeps the word that it was given, once it could be read."""

    def check(word: str) -> str:
        read(word)
        return word

    return AfterValidator(check)


_Rate = Annotated[str, _read_by(_rate)]
_Popularity = Annotated[str, _read_by(popularity)]
_Lengths = Annotated[str, _read_by(Lengths.parse)]
_Objective = Annotated[str, _read_by(Objective.parse)]


class Bench(Command):
    """Load a server with requests that arrive whether or not it keeps up, and measure it."""

    sections: ClassVar[dict[str, str]] = {
        "target": "the server",
        "request_rate": "when requests arrive",
        "adapter": "what they ask for",
        "goodput": "what is reported",
    }

    target: str = option(DEFAULT_TARGET, help="the server", metavar="HOST:PORT")
    backend: Literal["deltamux", "openai"] = option(
        "deltamux", help="gRPC, or completions over HTTP with the adapter in `model`, as vLLM's"
    )
    vocab_size: int | None = option(
        None, ge=1, help="of the model, for `openai`, which does not tell", metavar="N"
    )
    admin_target: str | None = option(
        None, help="its admin listener, where it has one", metavar="HOST:PORT"
    )

    # Words, because the parser of lists reads no infinity.
    request_rate: list[_Rate] = option(
        ["inf"],
        help="requests a second; repeatable; all at once when absent, or inf",
        metavar="RATE",
    )
    burstiness: float = option(
        1.0, gt=0, allow_inf_nan=False, metavar="K",
        help="shape of the gamma arrivals: 1 is Poisson, less is burstier",
    )  # fmt: skip
    num_prompts: int = option(100, ge=1, help="requests at each rate", metavar="N")
    warmup: int = option(0, ge=0, help="requests sent before, not measured", metavar="N")
    seed: int = option(0, ge=0, help="repeats the same workload", metavar="N")

    adapter: list[str] = option(
        default_factory=list, help="repeatable; all that generate when absent", metavar="NAME"
    )
    base: bool = option(False, help="ask for the base model instead of adapters")
    popularity: _Popularity = option(
        "uniform", help="identical, distinct, uniform or zipf:A", metavar="HOW"
    )
    input_len: _Lengths = option("128", help="prompt tokens, or LOW:HIGH", metavar="TOKENS")
    output_len: _Lengths = option("64", help="generated tokens, or LOW:HIGH", metavar="TOKENS")

    goodput: _Objective = option(
        "", help="objective in milliseconds, as ttft:200,itl:50,e2el:2000", metavar="LIMITS"
    )
    save_json: Path | None = option(None, help="write all figures there", metavar="FILE")
    save_png: Path | None = option(None, help="draw latency against load there", metavar="FILE")

    def bench_config(self) -> BenchConfig:
        """Raises ValueError for options that do not go together, or a file that cannot be written.

        Raises ImportError where a library of the `bench` extra is wanted and missing.
        """
        if self.base and self.adapter:
            raise ValueError("--base and --adapter exclude each other")
        _require_writable(self.save_json, self.save_png)
        if self.save_png is not None:
            import_module("matplotlib")
        rates = tuple(_rate(word) for word in self.request_rate)
        workload = Workload(
            adapters=("",) if self.base else tuple(self.adapter),
            requests=self.num_prompts,
            rate=rates[0],
            burstiness=self.burstiness,
            popularity=self.popularity,
            prompt_lengths=Lengths.parse(self.input_len),
            output_lengths=Lengths.parse(self.output_len),
            seed=self.seed,
        )
        return BenchConfig(
            connect=self._connect(),
            workload=workload,
            rates=rates,
            objective=Objective.parse(self.goodput),
            warmup=self.warmup,
            json_path=self.save_json,
            png_path=self.save_png,
        )

    def _connect(self) -> Callable[[], Backend]:
        if self.backend == "deltamux":
            if self.vocab_size is not None:
                raise ValueError("--vocab-size is for --backend openai: a deltamux server tells")
            return lambda: GrpcBackend(self.target, self.admin_target)
        from deltamux.bench.openai_backend import OpenAIBackend

        vocab_size = self.vocab_size
        if self.admin_target is not None:
            raise ValueError("--admin-target is for --backend deltamux")
        if vocab_size is None:
            raise ValueError("--backend openai needs --vocab-size")
        return lambda: OpenAIBackend(self.target, vocab_size)


def _require_writable(*paths: Path | None) -> None:
    """Not only after minutes of measuring. Raises ValueError."""
    for path in filter(None, paths):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written")


def main(arguments: Sequence[str]) -> int:
    options = Bench.parse("deltamux bench", arguments)
    try:
        try:
            config = options.bench_config()
        except ValueError as error:
            raise UsageError(f"deltamux bench: {error}") from None
        run(config, console())
    except BackendError as error:
        print(f"deltamux bench: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"deltamux bench: needs {error.name}: the extra 'bench'", file=sys.stderr)
        return 1
    return 0
