"""Matching of modules: the same answers as PEFT, and no pattern that can hang."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from deltamux.adapters.peft.lora_config import read_lora_config
from deltamux.adapters.peft.patterns import Pattern, PatternTable
from deltamux.errors import InvalidArgument

NAMES = [
    f"{stem}.{layer}.{module}"
    for stem in ("model.layers", "transformer.h", "gpt_neox.layers.0.experts")
    for layer in (0, 1, 2, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "attn.c_attn", "q_proj")
] + ["lm_head", "model.embed_tokens", "layers.3.q_proj", "q_proj", "0.q_proj"]


def selects_as_peft(**config: Any) -> None:
    """Asserts equal answers for all NAMES, and that they are not all the same."""
    selector = read_lora_config({"r": 8, "lora_alpha": 8, **config}).selector
    reference = SimpleNamespace(
        **{
            "exclude_modules": None,
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "target_parameters": None,
            **config,
        }
    )
    expected = {name: bool(check_target_module_exists(reference, name)) for name in NAMES}
    assert {name: selector.selects(name, True) for name in NAMES} == expected
    assert len(set(expected.values())) == 2


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj", "lm_head"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["proj", "_attn", "layers.1.self_attn.q_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.[0-1]\..*(q|up)_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": r"(?:model|transformer)\.\w+\.\d{2}\..*?proj$"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.layers\.1\d?\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 10]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ""},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["h"]},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1, 2],
            "layers_pattern": ["h", "layers", "experts"],
        },
        {
            "target_modules": ["q_proj", "c_attn"],
            "layers_to_transform": [0, 2],
            "layers_pattern": ["h|layers"],
        },
        {"target_modules": ["q_proj", "layers.0.q_proj"], "layers_to_transform": [3]},
    ],
)
def test_the_same_modules_as_in_peft(config: dict[str, Any]) -> None:
    selects_as_peft(**config)


parts = st.sampled_from(
    [
        "model",
        "layers",
        r"\.",
        ".",
        ".*",
        r"\d+",
        "q",
        "_proj",
        "(q|v)",
        "[0-9]",
        "h",
        "?",
        "$",
        "^",
    ]
)


@given(st.lists(parts, min_size=1, max_size=6).map("".join))
def test_any_simple_pattern_matches_as_in_peft(text: str) -> None:

    try:
        expected = [bool(re.fullmatch(text, name)) for name in NAMES]
        key = [get_pattern_key([text], name) == text and name != text for name in NAMES]
    except re.error:
        return
    try:
        pattern, table = Pattern(text), PatternTable({text: True})
    except InvalidArgument:
        return
    assert [pattern.matches(name) for name in NAMES] == expected
    assert [table.get(name, False) and name != text for name in NAMES] == key


def test_all_linear_means_every_linear_but_the_head() -> None:
    selector = read_lora_config(
        {"r": 8, "lora_alpha": 8, "target_modules": "All-Linear", "exclude_modules": ["q_proj"]}
    ).selector
    assert selector.selects("model.layers.0.mlp.up_proj", is_hidden_linear=True)
    assert not selector.selects("model.layers.0.q_proj", is_hidden_linear=True)
    assert not selector.selects("lm_head", is_hidden_linear=False)


@pytest.mark.parametrize(
    "values",
    [
        {"q_proj": 4},
        {"model.layers.0.self_attn.q_proj": 4, "q_proj": 2},
        {"q_proj": 2, "model.layers.0.self_attn.q_proj": 4},
        {r"layers\.\d\..*(q|v)_proj": 4, "v_proj": 16},
        {"attn.q_proj": 4, "self_attn.q_proj": 8, "proj": 1},
        {"model.layers.1": 3},
    ],
)
def test_the_first_key_that_ends_the_name_counts_as_in_peft(values: dict[str, int]) -> None:
    table = PatternTable(values)
    for name in NAMES:
        assert table.get(name, 99) == values.get(get_pattern_key(list(values), name), 99)


def test_idle_keys_are_those_that_match_nothing() -> None:
    table = PatternTable({"q_proj": 1, "k_proj": 2, "layers.0.nothing": 3})
    assert table.idle_keys(NAMES) == ["k_proj", "layers.0.nothing"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(r"(?!lm_head).*", id="look-ahead"),
        pytest.param(r"(a)\1", id="back-reference"),
        pytest.param(r"(?P<a>x)(?P=a)", id="named back-reference"),
        pytest.param("(unclosed", id="malformed"),
        pytest.param(r"a{,3}", id="open count, which RE2 reads as text"),
        pytest.param("[[:alpha:]]+", id="POSIX class, which Python reads as characters"),
        pytest.param("((((a{100}){100}){100}){100})", id="huge program"),
        pytest.param("\ud800", id="lone surrogate"),
    ],
)
def test_what_re2_cannot_say_exactly_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match="pattern") as caught:
        Pattern(text)
    assert caught.value.reason == "UNSUPPORTED_PATTERN"


@pytest.mark.parametrize("text", ["([a-z_.0-9]+)+X", "(.*)*X", "(a|a)*b", "(.*.*.*.*.*)*X"])
def test_a_pattern_that_hangs_python_does_not_hang_here(text: str) -> None:
    """In `re` these take minutes to hours on one name; the test's timeout is the assertion."""
    assert not any(Pattern(text).matches(name * 4) for name in NAMES)


def test_many_large_patterns_are_refused_together() -> None:
    patterns = {f"(x{{0,900}}){{4}}{i}": 1 for i in range(200)}
    with pytest.raises(InvalidArgument) as caught:
        PatternTable(patterns)
    assert caught.value.reason == "UNSUPPORTED_PATTERN"
