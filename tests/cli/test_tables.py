"""Tables hold what they are given, whatever it looks like."""

from __future__ import annotations

import pytest

from deltamux.cli.tables import print_facts, print_table

TEXTS = ("a name [/b] of [bold] tags", "a :smile: and a \\[", "long " * 100 + "end")


def test_facts_and_rows_are_printed_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts(dict.fromkeys(("refused",), TEXTS[0]))
    print_table(("what", "how"), [(text, "1") for text in TEXTS])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].rstrip() == f"refused  {TEXTS[0]}"
    assert [line.rpartition(" ")[0].rstrip() for line in printed[2:]] == list(TEXTS)
