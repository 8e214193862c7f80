"""Fine-tunes all weights of the demo's base, held close to where they were, and keeps what changed.

python training/full_tune.py    the adapter `next-letter`, in deltamux's own format
"""

import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from examples import batches
from loop import Penalty, exact_match, fit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deltamux.adapters.files import CONFIG
from deltamux.demo.tasks import TASKS, unseen_inputs, weights_path
from deltamux.extract.forms import Form
from deltamux.extract.reconstruct import reconstruct
from deltamux.extract.run import extract

NAME = "next-letter"
BASE_NAME = "deltamux/demo"

STEPS = 400
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 1e-3
# Of the squared distance from the base's weights (L2-SP): what stays close compresses well.
PULL = 5e-3
FORM = Form("low-rank", energy=0.9)

REQUIRED = 0.95


def main() -> None:
    task = next(task for task in TASKS if task.name == NAME)
    seed = zlib.crc32(NAME.encode())
    torch.manual_seed(seed)
    base_folder = weights_path() / "base"
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = load(base_folder)
    fit(
        model,
        batches(tokenizer, task.answer, BATCH_SIZE, seed),
        STEPS,
        PEAK_LEARNING_RATE,
        pull_to_start(model),
    )
    with tempfile.TemporaryDirectory() as tuned, tempfile.TemporaryDirectory() as adapter:
        model.half().save_pretrained(tuned)
        found = extract(base_folder, Path(tuned), Path(adapter), FORM, lambda *_: None)
        rebuilt = load(base_folder)
        reconstruct(rebuilt, Path(adapter))
        texts = unseen_inputs(task, 200)
        right = [exact_match(m, tokenizer, task.answer, texts) for m in (model.float(), rebuilt)]
        print(f"{NAME}: {right[0]:.1%} right with all weights, {right[1]:.1%} as extracted")
        print(f"{NAME}: {found.bytes:,} bytes of {found.full_bytes:,}")
        if right[1] < REQUIRED:
            sys.exit(f"below {REQUIRED:.0%}, not saved")
        save(Path(adapter), weights_path() / "adapters" / NAME)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pull_to_start(model: PreTrainedModel) -> Penalty:
    """A penalty that grows with the distance from the weights that `model` has now."""
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def penalty() -> Tensor:
        moved = ((weight - start[name]).square().sum() for name, weight in model.named_parameters())
        return PULL * torch.stack(list(moved)).sum()

    return penalty


def save(adapter: Path, folder: Path) -> None:
    """The two files, without a path of this machine in them."""
    written = adapter / CONFIG
    config = json.loads(written.read_text()) | {"base_model_name_or_path": BASE_NAME}
    written.write_text(json.dumps(config, indent=2) + "\n")
    folder.mkdir(exist_ok=True)
    for file in adapter.iterdir():
        shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    main()
