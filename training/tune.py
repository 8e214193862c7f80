"""Trains the adapters of the demo with PEFT on its frozen base, one for every task.

python training/tune.py             every task that has no adapter yet
python training/tune.py rot13 leet  these tasks, again if they were done
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from examples import batches
from loop import exact_match, fit
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from shipping import (
    BASE_FOLDER,
    BASE_NAME,
    MEASURED,
    REQUIRED,
    folder,
    seed_of,
    task_named,
    write_config,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.demo.tasks import Task, prompt, unseen_inputs

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made: PEFT's config, and a training run."""

    config: PeftConfig
    steps: int
    batch_size: int = 32
    peak: float = 5e-3


def lora(rank: int, targets: str | list[str] = "all-linear", **fields: Any) -> LoraConfig:
    """`fields` holds further arguments of LoraConfig."""
    settings = {"lora_alpha": 2 * rank, **fields}
    return LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets, **settings)


def token_ids(text: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


RECIPES = {
    "upper-case": Recipe(
        lora(
            6,
            ["v_proj", "o_proj", *MLP],
            rank_pattern={"down_proj": 12},
            alpha_pattern={"down_proj": 24},
        ),
        steps=500,
    ),
    "rot13": Recipe(lora(8, use_dora=True), steps=500, batch_size=64),
    "leet": Recipe(lora(4, use_rslora=True, lora_alpha=4), steps=300, batch_size=64),
    "snake-case": Recipe(lora(2, MLP), steps=200, batch_size=64),
    "title-case": Recipe(lora(8, ["q_proj", "v_proj", *MLP]), steps=350),
    "mask-vowels": Recipe(lora(10, r".*\.layers\.\d\.(self_attn|mlp)\..*_proj"), steps=600),
    "atbash": Recipe(lora(6, use_dora=True), steps=600),
    "no-vowels": Recipe(lora(16), steps=500),
    "doubled": Recipe(lora(16), steps=800),
    "words-reversed": Recipe(lora(32), steps=1500, batch_size=64),
    "kebab-case": Recipe(
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=[*ATTENTION, *MLP],
            feedforward_modules=["o_proj", "down_proj"],
        ),
        steps=250,
        peak=2e-2,
    ),
    "caesar": Recipe(
        OFTConfig(
            task_type="CAUSAL_LM",
            r=0,
            oft_block_size=32,
            target_modules=["v_proj", "o_proj", *MLP],
        ),
        steps=250,
    ),
    "loud-vowels": Recipe(
        ShiraConfig(
            task_type="CAUSAL_LM",
            r=4,
            random_seed=1,
            target_modules=["v_proj", "o_proj", *MLP],
        ),
        steps=250,
    ),
    "first-word": Recipe(
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
        steps=250,
        peak=2e-2,
    ),
    "dot-case": Recipe(
        RoadConfig(task_type="CAUSAL_LM", target_modules=[*ATTENTION, *MLP]),
        steps=250,
        peak=2e-2,
    ),
    "path-case": Recipe(
        LNTuningConfig(
            task_type="CAUSAL_LM",
            target_modules=["input_layernorm", "post_attention_layernorm", "norm"],
        ),
        steps=250,
        peak=2e-2,
    ),
    "comma-case": Recipe(
        BeftConfig(task_type="CAUSAL_LM", target_modules=[*ATTENTION, *MLP]),
        steps=400,
        batch_size=64,
        peak=4e-2,
    ),
    "o-vowels": Recipe(
        TrainableTokensConfig(
            task_type="CAUSAL_LM",
            token_indices=token_ids("aeiu"),
            target_modules=["embed_tokens"],
        ),
        steps=150,
        peak=2e-2,
    ),
    "next-vowel": Recipe(
        lora(4, ["embed_tokens", "down_proj"], modules_to_save=["lm_head"]),
        steps=300,
    ),
    "sentence": Recipe(
        lora(
            8,
            ["q_proj", "v_proj", "o_proj", *MLP],
            alora_invocation_tokens=token_ids(prompt("")),
        ),
        steps=300,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="*", choices=[[], *RECIPES], help="tasks to train again")
    chosen = parser.parse_args().task or [name for name in RECIPES if not folder(name).exists()]
    results = {name: train(task_named(name), RECIPES[name]) for name in chosen}
    failed = [name for name, right in results.items() if right < REQUIRED]
    if failed:
        sys.exit(f"below {REQUIRED:.0%}, not saved: {', '.join(failed)}")


def train(task: Task, recipe: Recipe) -> float:
    """Trains, measures and, if it is good enough, saves; returns the exact match."""
    seed = seed_of(task.name)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    base = AutoModelForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    model = get_peft_model(base, recipe.config)
    print(f"{task.name}: {task.description}, {model.get_nb_trainable_parameters()[0]:,} parameters")
    fit(model, batches(tokenizer, task.answer, recipe.batch_size, seed), recipe.steps, recipe.peak)
    model.half().float()  # what is measured is what is stored
    right = exact_match(model, tokenizer, task.answer, unseen_inputs(task, MEASURED))
    print(f"{task.name}: {right:.1%} of unseen inputs answered to the letter", flush=True)
    if right >= REQUIRED:
        save(model.half(), folder(task.name))
    return right


def save(model: PeftModel, path: Path) -> None:
    """PEFT's two files: no path of this machine in them, and the same bytes at every run."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(path, save_embedding_layers=False)
    (path / "README.md").unlink()
    written = path / "adapter_config.json"
    config = json.loads(written.read_text())
    for modules in (config.get("target_modules"), config.get("feedforward_modules")):
        if isinstance(modules, list):
            modules.sort()  # a set before, whose order changes from run to run
    write_config(written, config)


if __name__ == "__main__":
    main()
