"""What the reference refuses, in one line: libraries and files that are not as they must be."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from deltamux.demo.tasks import weights_path
from deltamux.verify import alone
from deltamux.verify.alone import Missing, Question, Refused

BASE = str(weights_path() / "base")
ROT13 = weights_path() / "adapters" / "rot13"
QUESTION = Question(
    library="peft",
    adapter=str(ROT13),
    model=BASE,
    auto_class="AutoModelForCausalLM",
    config={},
    device="cpu",
    dtype="float32",
    prompts=[[1, 2, 3]],
    plain="logits",
    adapted="logits",
)


def test_a_library_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adapters", None)
    with pytest.raises(Missing, match="has no package 'adapters'"):
        alone.import_library("adapterhub")


@pytest.mark.parametrize("version", ["0.2.2", "0.10"])
def test_a_library_that_is_too_old_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("adapters")
    library.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "adapters", library)
    with pytest.raises(Refused, match=rf"has adapters {version}; 1\.0 or later is needed"):
        alone.import_library("adapterhub")


def test_an_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone.transformers, "__version__", "4.9.1")
    with pytest.raises(Refused, match=r"has transformers 4\.9\.1; 4\.56 or later is needed"):
        alone.import_library("peft")


@pytest.mark.parametrize("wanted", ["transformers", "nothing_of_this_name"])
def test_a_library_that_does_not_fit_its_surroundings_is_not_called_missing(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters.py").write_text(f"from {wanted} import NothingOfThisName\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "adapters", raising=False)
    with pytest.raises(
        Refused, match=r"^adapters cannot be imported by .* transformers 5"
    ) as found:
        alone.import_library("adapterhub")
    assert found.type is Refused and len(str(found.value).splitlines()) == 1


def test_what_the_library_cannot_load_is_said_in_one_line(tmp_path: Path) -> None:
    for file in ROT13.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:1000])
    with pytest.raises(Refused, match=r"^PEFT cannot load the adapter: .*$"):
        alone.answer(replace(QUESTION, adapter=str(tmp_path)))


def test_a_model_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^transformers .* cannot load .*$"):
        alone.answer(replace(QUESTION, model=str(tmp_path)))
