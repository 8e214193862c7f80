"""Trains the adapters of the demo with PEFT on its frozen base, one for every task.

python training/adapters.py             every task that has no adapter yet
python training/adapters.py rot13 leet  these tasks, again if they were done
"""

import argparse
import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from examples import batches
from loop import exact_match, fit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.demo.tasks import TASKS, Task, unseen_inputs, weights_path

BASE_NAME = "deltamux/demo"  # what adapter_config.json calls the base, on every machine

REQUIRED = 0.95

MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made; `lora` holds further arguments of LoraConfig."""

    rank: int
    steps: int
    targets: str | list[str] = "all-linear"
    batch_size: int = 32
    peak: float = 5e-3
    lora: dict[str, Any] = field(default_factory=dict)

    def config(self) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            target_modules=self.targets,
            **{"lora_alpha": 2 * self.rank, **self.lora},
        )


RECIPES = {
    "upper-case": Recipe(
        rank=6,
        steps=500,
        targets=["v_proj", "o_proj", *MLP],
        lora={"rank_pattern": {"down_proj": 12}, "alpha_pattern": {"down_proj": 24}},
    ),
    "rot13": Recipe(rank=8, steps=500, batch_size=64, lora={"use_dora": True}),
    "leet": Recipe(rank=4, steps=300, batch_size=64, lora={"use_rslora": True, "lora_alpha": 4}),
    "snake-case": Recipe(rank=2, steps=200, batch_size=64, targets=MLP),
    "title-case": Recipe(rank=8, steps=350, targets=["q_proj", "v_proj", *MLP]),
    "mask-vowels": Recipe(rank=10, steps=600, targets=r".*\.layers\.\d\.(self_attn|mlp)\..*_proj"),
    "atbash": Recipe(rank=6, steps=600, lora={"use_dora": True}),
    "no-vowels": Recipe(rank=16, steps=500),
    "doubled": Recipe(rank=16, steps=800),
    "words-reversed": Recipe(rank=32, steps=1500, batch_size=64),
}


def main() -> None:
    tasks = {task.name: task for task in TASKS if task.name in RECIPES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="*", choices=[[], *tasks], help="tasks to train again")
    chosen = parser.parse_args().task or [name for name in tasks if not folder(name).exists()]
    results = {name: train(tasks[name], RECIPES[name]) for name in chosen}
    failed = [name for name, right in results.items() if right < REQUIRED]
    if failed:
        sys.exit(f"below {REQUIRED:.0%}, not saved: {', '.join(failed)}")


def train(task: Task, recipe: Recipe) -> float:
    """Trains, measures and, if it is good enough, saves; returns the exact match."""
    seed = zlib.crc32(task.name.encode())
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(weights_path() / "base")
    base = AutoModelForCausalLM.from_pretrained(weights_path() / "base", dtype=torch.float32)
    model = get_peft_model(base, recipe.config())
    print(f"{task.name}: {task.description}, {model.get_nb_trainable_parameters()[0]:,} parameters")
    fit(model, batches(tokenizer, task.answer, recipe.batch_size, seed), recipe.steps, recipe.peak)
    model.half().float()  # what is measured is what is stored
    right = exact_match(model, tokenizer, task.answer, unseen_inputs(task, 200))
    print(f"{task.name}: {right:.1%} of unseen inputs answered to the letter", flush=True)
    if right >= REQUIRED:
        save(model.half(), folder(task.name))
    return right


def folder(name: str) -> Path:
    return weights_path() / "adapters" / name


def save(model: PeftModel, path: Path) -> None:
    """PEFT's two files: no path of this machine in them, and the same bytes at every run."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(path, save_embedding_layers=False)
    (path / "README.md").unlink()
    written = path / "adapter_config.json"
    config = json.loads(written.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set before, whose order changes from run to run
    written.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
