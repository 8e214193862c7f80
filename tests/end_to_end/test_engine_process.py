"""The engine process over its socket, held to transformers and PEFT."""

PROMPTS = [tuple(range(start, start + length)) for start, length in ((3, 5), (40, 23), (9, 70))]


def test_greedy_tokens_equal_those_of_transformers_and_peft(engine, world, submit):
    """More adapters than slots, beside the base, all at once."""
    cases = [(prompt, adapter) for prompt in PROMPTS for adapter in ("", *world.adapters)]
    submits = [submit(f"greedy-{n}", *case) for n, case in enumerate(cases)]
    for (prompt, adapter), answer in zip(cases, engine.run(*submits), strict=True):
        assert answer.tokens == {0: world.greedy(prompt, 8, adapter)}, (len(prompt), adapter)
        assert answer.finish == {0: "length"}
