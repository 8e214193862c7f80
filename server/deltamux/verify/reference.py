"""What an adapter is held to: the library that wrote it, here or in another Python."""

from __future__ import annotations

from pathlib import Path

from deltamux.adapters.checkpoint.manifest import Library, read_manifest
from deltamux.errors import FailedPrecondition
from deltamux.extract.reconstruct import reconstruct
from deltamux.verify import alone
from deltamux.verify.alone import Answer, Missing, Question, Refused
from deltamux.verify.interpreter import Interpreter

_OWN: Library = "deltamux"
_HOW_TO_INSTALL: dict[Library, str] = {
    "peft": "PEFT is not installed, and the adapter is compared with it: "
    "pip install 'deltamux[verify]'",
    "adapterhub": "AdapterHub is not installed, and the adapter is compared with it; it needs an "
    "environment of its own: python -m venv adapterhub; adapterhub/bin/pip install torch "
    "adapters==1.3.0; then pass --reference-python adapterhub/bin/python",
}


def require_library(adapter: Path) -> None:
    """Raises FailedPrecondition where this Python lacks the library that wrote the adapter."""
    library = read_manifest(adapter).library
    if library == _OWN:
        return
    try:
        alone.import_library(library)
    except Missing:
        raise FailedPrecondition(_HOW_TO_INSTALL[library]) from None
    except Refused as refused:
        raise FailedPrecondition(str(refused)) from None


def reference(question: Question, elsewhere: Interpreter | None) -> Answer:
    """Loads the model anew. Raises FailedPrecondition where the library does not answer.

    Without `elsewhere`, in this Python. An own adapter has no library: it is written into the
    model's weights, densely.
    """
    try:
        if question.library == _OWN:
            return _reconstructed(question)
        return alone.answer(question) if elsewhere is None else elsewhere.ask(question)
    except Refused as refused:
        raise FailedPrecondition(str(refused)) from None


def _reconstructed(question: Question) -> Answer:
    model = alone.load_model(question)
    body = model.base_model
    plain = alone.run(model, body, question.prompts, question.plain)
    reconstruct(model, Path(question.adapter))
    adapted = alone.run(model, body, question.prompts, question.adapted)
    return Answer("dense reconstruction", plain, adapted)
