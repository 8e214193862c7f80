"""The engine's decisions under seeded faults and a virtual clock."""

from __future__ import annotations


def test_every_seed_keeps_the_promises(simulate, ahead):
    happened = simulate(ahead)
    followers, simulations = happened.pop("followers"), happened.pop("simulations")
    assert followers > 10 * simulations if ahead else followers == 0
    assert happened.keys() == {
        "preemptions",
        "prefix hits",
        "evictions",
        "INVALID_ARGUMENT",
        "PROMPT_LENGTH",
        "NON_FINITE_OUTPUT",
        "OUT_OF_MEMORY",
        "DEADLINE_EXCEEDED",
    }
    assert min(happened.values()) > 100
