"""JSON without leniency."""

from __future__ import annotations

import pytest

from deltamux.adapters.checkpoint.strict_json import parse_object, quoted
from deltamux.errors import InvalidArgument


def test_plain_json_is_read() -> None:
    text = r'{"a": [1, -2.5, true, null, "x", "\ud83d\ude00"], "b": {"c": {}}}'
    assert parse_object(text.encode(), "it") == {
        "a": [1, -2.5, True, None, "x", "\U0001f600"],
        "b": {"c": {}},
    }


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="BI-31 empty"),
        pytest.param(b"r: 8", id="BI-31 not JSON"),
        pytest.param(b"\xef\xbb\xbf{}", id="BI-31 BOM"),
        pytest.param(b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}", id="BI-31 1,000 deep"),
        pytest.param(b'{"a":' + b"[" * 100_000, id="BI-31 100,000 deep"),
        pytest.param(b'{"a":' + b"[" * 17 + b"]" * 17 + b"}", id="BI-31 17 deep"),
        pytest.param(b'{"r": 8, "r": 4096}', id="BI-32 duplicates"),
        pytest.param(b'{"a": {"r": 8, "r": 8}}', id="BI-32 duplicates below"),
        pytest.param(b'{"a": NaN}', id="BI-33 NaN"),
        pytest.param(b'{"a": -Infinity}', id="BI-33 Infinity"),
        pytest.param(b'{"a": 1e999}', id="BI-33 1e999"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", id="BI-33 5,000 digits"),
        pytest.param(b'{"a": "\xff"}', id="not UTF-8"),
        pytest.param(rb'{"\ud83d": 1}', id="half of a surrogate pair"),
        pytest.param(rb'{"a": ["\udE00"]}', id="half of a surrogate pair below"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"{} {}", id="two objects"),
    ],
)
def test_anything_doubtful_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^it is not strict JSON") as caught:
        parse_object(data, "it")
    assert caught.value.reason == "MALFORMED_JSON"


def test_a_quoted_name_is_escaped_and_short() -> None:
    assert quoted("a\n\x1b[31m") == r"'a\n\x1b[31m'"
    assert len(quoted("x" * 10_000)) == 120
