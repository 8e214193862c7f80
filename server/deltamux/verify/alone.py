"""One adapter alone in the library that wrote it, on a model of its own: the reference.

deltamux imports this file, and other interpreters run it, whose libraries are of other versions and
which have no deltamux; so it imports nothing of deltamux.

    python -I alone.py FOLDER

reads FOLDER/question.json and leaves FOLDER/logits.safetensors and FOLDER/answer.json behind; when
it refuses, FOLDER/answer.json alone, with the reason.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

# What of a prompt is compared: the logits that a head gives, or the mean of the last hidden states.
Rows = Literal["logits", "embeddings"]

_QUESTION = "question.json"
_ANSWER = "answer.json"
_LOGITS = "logits.safetensors"

# Of each library: its Python package, and what it is called.
_PACKAGES = {"peft": "peft", "adapterhub": "adapters"}
_TITLES = {"peft": "PEFT", "adapterhub": "AdapterHub"}
# The first versions that are used as it is done here.
_FIRST = {"transformers": (4, 56), "peft": (0, 18), "adapters": (1, 0)}


class Refused(Exception):
    """Model or library are not to be had, or do not take the adapter; the message is one line."""


class Missing(Refused):
    """The library is not installed."""


@dataclass(frozen=True)
class Question:
    """An adapter's folder and library, the model that it is for, and prompts of token ids.

    `auto_class` of transformers loads the model, with the settings `config` in place of its own.
    """

    library: str
    adapter: str
    model: str
    auto_class: str
    config: Mapping[str, int]
    device: str
    dtype: str
    prompts: Sequence[Sequence[int]]
    # What is compared without and with the adapter.
    plain: Rows
    adapted: Rows
    # That the adapter's model was resized to; 0: it was not.
    vocab_size: int = 0

    def write(self, folder: Path) -> None:
        (folder / _QUESTION).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Question:
        return cls(**json.loads((folder / _QUESTION).read_text()))


@dataclass(frozen=True, eq=False)
class Answer:
    """What was asked for of each prompt, without and with the adapter, as `run` returns it."""

    library: str
    plain: list[Tensor]
    adapted: list[Tensor]

    def write(self, folder: Path) -> None:
        plain = {f"plain.{number}": rows for number, rows in enumerate(self.plain)}
        adapted = {f"adapted.{number}": rows for number, rows in enumerate(self.adapted)}
        save_file({**plain, **adapted}, folder / _LOGITS)
        (folder / _ANSWER).write_text(json.dumps({"library": self.library}))

    @classmethod
    def read(cls, folder: Path) -> Answer:
        """Raises Refused where that was the answer, FileNotFoundError where there is none."""
        answer = json.loads((folder / _ANSWER).read_text())
        if "refused" in answer:
            raise Refused(answer["refused"])
        rows = load_file(folder / _LOGITS)
        numbers = range(len(rows) // 2)
        plain, adapted = ([rows[f"{name}.{n}"] for n in numbers] for name in ("plain", "adapted"))
        return cls(answer["library"], plain, adapted)


def answer(question: Question) -> Answer:
    """Loads model and adapter and runs every prompt. Raises Refused."""
    library = import_library(question.library)
    model = load_model(question)
    body = model.base_model
    plain = run(model, body, question.prompts, question.plain)
    if question.vocab_size:
        model.resize_token_embeddings(question.vocab_size, mean_resizing=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = _LOADERS[question.library](library, model, question.adapter)
    except Refused:
        raise
    except Exception as error:
        # Whatever a library raises for an adapter that it does not take.
        title = _TITLES[question.library]
        raise Refused(f"{title} cannot load the adapter: {_first_line(error)}") from None
    words = (
        f"{_TITLES[question.library]} {library.__version__} on transformers "
        f"{transformers.__version__}"
    )
    return Answer(words, plain, run(adapted, body, question.prompts, question.adapted))


def import_library(name: str) -> ModuleType:
    """Raises Missing for a library that is not installed, Refused for one that does not work."""
    package = _PACKAGES[name]
    _require_version("transformers", transformers.__version__)
    try:
        library = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise Missing(
                f"{sys.executable} has no package {package!r}, which the adapter is compared with"
            ) from None
        raise _not_importable(package, error) from None
    except Exception as error:
        raise _not_importable(package, error) from None
    _require_version(package, library.__version__)
    return library


def load_model(question: Question) -> Any:
    """The transformers model that the adapter is for. Raises Refused."""
    try:
        model = getattr(transformers, question.auto_class).from_pretrained(
            question.model,
            dtype=getattr(torch, question.dtype),
            attn_implementation="eager",
            trust_remote_code=False,
            **question.config,
        )
        return model.to(question.device).eval()
    except Exception as error:
        version = transformers.__version__
        raise Refused(
            f"transformers {version} cannot load {question.model}: {_first_line(error)}"
        ) from None


@torch.inference_mode()
def run(model: Any, body: Any, prompts: Sequence[Sequence[int]], wanted: Rows) -> list[Tensor]:
    """Of each prompt alone, float32 on the host.

    Logits [tokens, V] or [tokens, labels], those of a head for sequences [1, labels]; embeddings
    [1, width], of what the `body` of the model, without its head, gives last.
    """
    hidden: list[Tensor] = []
    hook = body.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    found: list[Tensor] = []
    for prompt in prompts:
        hidden.clear()
        output = model(input_ids=torch.tensor([prompt], device=model.device))
        rows = output.logits if wanted == "logits" else hidden[0]
        # Virtual tokens may have rows too, in front.
        rows = rows[0, -len(prompt) :] if rows.ndim == 3 else rows
        rows = rows if wanted == "logits" else rows.float().mean(0, keepdim=True)
        found.append(rows.float().cpu())
    hook.remove()
    return found


def _by_peft(peft: Any, model: Any, adapter: str) -> Any:
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def _by_adapterhub(adapters: Any, model: Any, adapter: str) -> Any:
    # Without this file, AdapterHub would look for a pickle.
    if not (Path(adapter) / "adapter.safetensors").is_file():
        raise Refused(f"{adapter} has no adapter.safetensors, which AdapterHub reads")
    adapters.init(model)
    found: dict[str, list[str]] = {}
    name = model.load_adapter(adapter, set_active=True, use_safetensors=True, loading_info=found)
    for kind in ("missing_keys", "unexpected_keys"):
        if found.get(kind):
            raise Refused(f"AdapterHub reports {kind} in the adapter: {found[kind][0]}")
    model.adapter_to(name, device=model.device, dtype=model.dtype)
    return model.eval()


_LOADERS = {"peft": _by_peft, "adapterhub": _by_adapterhub}


def _require_version(package: str, version: str) -> None:
    first = _FIRST[package]
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < first:
        wanted = ".".join(map(str, first))
        raise Refused(f"{sys.executable} has {package} {version}; {wanted} or later is needed")


def _not_importable(package: str, error: Exception) -> Refused:
    return Refused(
        f"{package} cannot be imported by {sys.executable}, beside transformers "
        f"{transformers.__version__}: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(folder: Path) -> None:
    try:
        answer(Question.read(folder)).write(folder)
    except Refused as refused:
        (folder / _ANSWER).write_text(json.dumps({"refused": str(refused)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
