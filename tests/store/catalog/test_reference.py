"""References: what may be a name, and what may follow the at sign."""

from __future__ import annotations

import pytest

from deltamux.errors import InvalidArgument
from deltamux.store.catalog.reference import Reference

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "org/model/v2", "con", "a" * 200, "a..b", "9"])
def test_sound_names(name):
    assert Reference.parse(name) == Reference(name)
    assert Reference.parse(f"{name}@{DIGEST}") == Reference(name, DIGEST)


SHAPES = ["", "../x", "/abs", "a/../b", "a/.", "..\\x", "~", "C:\\x", ".", "-a", "a" * 201]
CHARACTERS = ["a%2fb", "a b", "a\n", "a\x1b", "a\0", "\x7f"]
FOREIGN = ["\xe9", "\u0430dmin", "\u202ea", "\U0001f600"]
REFERENCES = ["https://a/b", "@", "a b@c"]


@pytest.mark.parametrize("name", SHAPES + CHARACTERS + FOREIGN + REFERENCES)
def test_refused_names(name):
    with pytest.raises(InvalidArgument) as error:
        Reference.parse(name)
    assert error.value.reason == "INVALID_ADAPTER_NAME"


@pytest.mark.parametrize(
    "version", ["", "latest", "latest@x", DIGEST + "0", DIGEST[:7], DIGEST.upper(), "x" * 64]
)
def test_refused_versions(version):
    with pytest.raises(InvalidArgument) as error:
        Reference.parse(f"a@{version}")
    assert error.value.reason == "INVALID_ADAPTER_VERSION"


def test_a_digest_may_be_shortened_to_eight_characters():
    assert Reference.parse("a@01234567") == Reference("a", "01234567")
