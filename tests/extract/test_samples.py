"""Prompts as token ids: by the model's tokenizer, and where it has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltamux.demo.tasks import weights_path
from deltamux.errors import InvalidArgument
from deltamux.extract.samples import sample_texts, token_ids

PEERS = Path(__file__).parents[1] / "peers" / "adapterhub"


def test_a_file_gives_its_lines_to_the_models_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\n\n  \ntwo words\n" + "x" * 2000)
    texts = sample_texts(tmp_path / "prompts")
    ids = token_ids(texts, str(weights_path() / "base"), 259)
    assert [len(prompt) for prompt in ids] == [4, 10, 512]


# For the one transformers finds none; for the other it makes one that reads nothing.
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_only_own_texts_are_replaced_where_there_is_no_tokenizer(model: str) -> None:
    ids = token_ids(sample_texts(None), str(PEERS / model), 61)
    assert [len(prompt) for prompt in ids] == [16] * 4 and max(map(max, ids)) < 61
    with pytest.raises(InvalidArgument, match="no tokenizer to read the prompts with"):
        token_ids(("a prompt of the user",), str(PEERS / model), 61)
