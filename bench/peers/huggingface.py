"""A worker that serves cells with transformers' generate, alone or under PEFT's `adapter_names`.

Usage: python huggingface.py plain|peft MODEL_FOLDER ADAPTERS THREADS

Says its version, then reads one cell as JSON a line and answers with one line.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from workload import Cell, Run, adapter_name


class FirstStep(LogitsProcessor):
    """Notes when the first token's logits are there, that is, when the prefill is over."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return scores


def load(kind: str, folder: Path, adapters: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if kind == "plain":
        return model.eval()
    names = [adapter_name(i) for i in range(adapters)]
    peft = PeftModel.from_pretrained(model, folder / "adapters" / names[0], adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(folder / "adapters" / name, adapter_name=name)
    return peft.eval()


def serve(model: Any, kind: str, cell: Cell) -> Run:
    prompts = torch.tensor(cell.prompts)
    extra = {}
    if kind == "peft":
        extra["adapter_names"] = [
            "__base__" if index is None else adapter_name(index) for index in cell.adapters
        ]
    first = FirstStep()
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=cell.new_tokens,
            min_new_tokens=cell.new_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([first]),
            **extra,
        )
    end = time.perf_counter()
    assert first.at is not None
    return Run(end - start, first.at - start, out[:, prompts.shape[1] :].tolist())


def main() -> None:
    kind, folder, adapters, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = load(kind, Path(folder), int(adapters))
    library = {"plain": "transformers", "peft": "peft"}[kind]
    print(json.dumps({"version": version(library)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(serve(model, kind, Cell(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main()
