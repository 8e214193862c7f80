import pytest

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.adapters.traits import Traits
from deltamux.engine.kv.block_keys import block_key


@pytest.fixture
def keys(new_sequence):
    """keys(tokens, ...) -> the keys of all full blocks of four."""

    def keys(tokens, adapter="", salt=""):
        sequence = new_sequence(adapter=adapter, salt=salt)
        sequence.tokens = list(tokens)
        return [block_key(sequence, index, 4) for index in range(len(tokens) // 4)]

    return keys


def test_equal_beginnings_have_equal_keys_and_no_others(keys):
    first, second = keys(range(8)), keys([*range(6), 7, 7])
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_a_key_depends_on_all_that_comes_before(keys):
    assert keys([0, *range(1, 8)])[1] != keys([9, *range(1, 8)])[1]


def test_nothing_is_shared_between_adapters_or_salts(keys):
    """A salt that looks like an adapter is none, even where both together read the same."""
    cases = [("", ""), ("a", ""), ("b", ""), ("", "a"), ("a", "b"), ("ab", ""), ("", "ab")]
    assert len({keys(range(4), *case)[0] for case in cases}) == len(cases)


def test_order_in_which_keys_are_asked_for_changes_nothing(new_sequence):
    sequence = new_sequence(num_prompt=12, salt="")
    last = block_key(sequence, 2, 4)
    assert len({block_key(sequence, index, 4) for index in range(3)} | {last}) == 3
    other = new_sequence(num_prompt=12, salt="")
    assert [block_key(other, index, 4) for index in range(3)][2] == last


def test_tokens_that_come_later_change_no_key(new_sequence):
    sequence = new_sequence(num_prompt=4)
    key = block_key(sequence, 0, 4)
    sequence.tokens.append(5)
    assert block_key(sequence, 0, 4) == key


def test_virtual_tokens_are_the_same_for_every_request_of_their_adapter(new_sequence):
    def keys(adapter, salt):
        sequence = new_sequence(num_prompt=6, adapter=adapter, salt=salt)
        sequence.begin_with(Traits(Virtual(6)))
        return [block_key(sequence, index, 4) for index in range(3)]

    first, other_salt, other_adapter = keys("a", "s"), keys("a", "t"), keys("b", "s")
    assert first[0] == other_salt[0]
    assert len({*first, *other_salt, *other_adapter}) == 8


def test_virtual_tokens_that_become_known_change_the_keys(new_sequence):
    early, late = new_sequence(salt="", adapter="a"), new_sequence(salt="", adapter="a")
    block_key(early, 0, 4)
    for sequence in (early, late):
        sequence.begin_with(Traits(Virtual(3)))
    assert block_key(early, 0, 4) == block_key(late, 0, 4)
