"""Every type of adapter is served by one family or refused for a reason, and the table says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS
from deltamux.adapters.checkpoint.manifest import TYPES, Library, Manifest
from deltamux.adapters.families import FAMILIES
from deltamux.adapters.family import Family
from deltamux.adapters.unserved import UNSERVED
from deltamux.errors import FailedPrecondition

TABLE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
KNOWN = [(library, type) for library, types in TYPES.items() for type in sorted(types)]
REFUSED = [(library, type) for library, types in UNSERVED.items() for type in types]


def rows(heading: str) -> dict[str, str]:
    """The third column of the table below a heading, by each type that its second names."""
    section = TABLE.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    return {type: row[2] for row in cells for type in re.findall(r"`([\w-]+)`", row[1])}


@pytest.mark.parametrize(("library", "type"), KNOWN)
def test_a_type_is_claimed_by_one_family_or_has_a_reason(library: Library, type: str) -> None:
    manifest = Manifest(library, type, {"config": {"composition_mode": "add"}})
    claiming = [family.name for family in FAMILIES if family.claims(manifest)]
    assert len(claiming) + (type in UNSERVED[library]) == 1, claiming


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_a_family_claims_no_type_that_is_refused_as_unknown(family: Family) -> None:
    unknown = set(getattr(family, "peft_types", ())) - TYPES["peft"]
    assert not unknown, f"{unknown} are missing in TYPES of adapters/checkpoint/manifest.py"


@pytest.mark.parametrize(("library", "type"), KNOWN)
def test_the_documents_say_how_a_type_is_served_or_why_not(library: Library, type: str) -> None:
    if type in UNSERVED[library]:
        assert rows("## Not served")[type] == UNSERVED[library][type]
        assert library == "adapterhub" or type not in rows("## Served")
    else:
        assert rows("## Served")[type]


@pytest.mark.parametrize(("library", "type"), REFUSED)
def test_a_type_is_refused_at_load_with_its_reason(
    library: Library, type: str, serve: Callable[..., Any], tmp_path: Path
) -> None:
    configs: dict[Library, dict[str, Any]] = {
        "peft": {"peft_type": type},
        "adapterhub": {"config": {"architecture": type}, "model_type": "llama", "name": "a"},
    }
    (tmp_path / CONFIG).write_text(json.dumps(configs[library]))
    save_file({"weight": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(FailedPrecondition) as caught:
        serve("llama").parse(tmp_path)
    assert caught.value.reason == "UNSUPPORTED_TYPE"
    assert UNSERVED[library][type] in caught.value.message
