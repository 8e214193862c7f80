"""Measures deltamux with sixteen adapters of eight families in one batch against sixteen of LoRA.

Usage: python bench/peers/families.py [--rounds 5] [--json FILE]

Both batches and the base alone take turns on one server.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path

import model
import peft
import torch
from deltamux_server import DeltamuxServer
from measure import measure
from transformers import LlamaForCausalLM
from workload import FIRST_OF_FAMILIES, NEW_TOKENS, Cell, adapter_name

BATCH = 16
LINEARS = [linear.split(".")[1] for linear in model.LINEARS]


def configs() -> list[peft.PeftConfig]:
    """One of each family, on all linear layers where it has layers to choose."""
    targets = {"target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    return [
        peft.LoraConfig(r=16, **targets),
        peft.IA3Config(feedforward_modules=["down_proj"], **targets),
        peft.LNTuningConfig(task_type="CAUSAL_LM"),
        peft.ShiraConfig(r=4, **targets),
        peft.OFTConfig(r=0, oft_block_size=32, **targets),
        peft.LoHaConfig(r=3, **targets),
        peft.RoadConfig(**targets),
        peft.PromptTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM"),
    ]


def make_adapters(folder: Path) -> list[int]:
    """Makes what is missing of the sixteen, two of each family; returns their numbers."""
    numbers = list(range(FIRST_OF_FAMILIES, FIRST_OF_FAMILIES + BATCH))
    for number, config in zip(numbers, configs() * 2, strict=True):
        adapter = folder / "adapters" / adapter_name(number)
        if not (adapter / "adapter_model.safetensors").exists():
            print(f"making adapter {adapter.name}: {config.peft_type.value}", flush=True)
            _make_adapter(folder / "base", config, adapter, number)
    return numbers


def _make_adapter(base: Path, config: peft.PeftConfig, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
        tuned.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", type=Path, default=model.FOLDER)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model.make(args.model)
    adapters = [*range(BATCH), *make_adapters(args.model)]
    server = DeltamuxServer(args.model, adapters, args.threads, cache_prefixes=False)
    cells = [Cell(mode, BATCH) for mode in ("base", "distinct", "families")]
    try:
        runs = measure(cells, [server], args.rounds)
    finally:
        server.close()
    rates = {
        cell.mode: BATCH * NEW_TOKENS / statistics.median(run.seconds for run in found)
        for (cell, _), found in runs.items()
    }
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "rounds": args.rounds,
        "tokens_per_second": {mode: round(rate, 1) for mode, rate in rates.items()},
        "families / LoRA": round(rates["families"] / rates["distinct"], 3),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
