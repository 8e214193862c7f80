"""How many operations of torch a decode step is, and how much memory it takes anew.

A limit that fails is a question. If the step should cost more, say in the commit what it buys,
with a measurement, and write the new number here with where it comes from; if it costs less,
lower the number, so that the gain is kept.
"""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import Base, adopt
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.replay.cuda_graphs import StepGraphs
from deltamux.engine.replay.recorded_steps import STEPS_BEFORE
from deltamux.engine.replay.step_buffers import StepBuffers, StepShape
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.runner import ModelRunner
from deltamux.engine.transfer import Upload
from deltamux.wire.messages import Sampling
from deltamux_kernels import native

LAYERS, BLOCK_SIZE, MAX_ADAPTERS = 2, 16, 16
# Products of an adapter in a layer. q, k and v read one input, gate and up another: one A for each.
A_PRODUCTS, B_PRODUCTS = 4, 7

# The batch makes tensors of seven arrays, two of them with a dimension more. The sampler wants
# logits in float32 (1), adds them up (1), lends them to NumPy (4) and takes tokens back (1). Both
# go to the host as one (2), where NumPy reads them (4): on a GPU, that is all that anybody waits
# for.
OUTSIDE_THE_MODEL = 22
# A replayed step sends all its integers in one copy; another puts the blocks of each sequence where
# rows are as wide as the longest may ever need. These are eight, with views of what is in use. The
# logits of its own rows (2), and what the sampler does with them as above (12).
BESIDE_A_REPLAY, COPIES_BEFORE_A_REPLAY = 22, 2
# The embedding (1), the angles of positions (11), the last norm (1) and the head of the sampled
# rows (3).
AROUND_THE_LAYERS = 16
# Of a step that was recorded, what makes numbers is left. The batch makes tensors of seven arrays,
# two of them with a dimension more, and three are copied to where the recording reads (12). The
# embedding (1), the angles of positions (8) and the sampled rows (1); a layer's two sums (2). The
# sampler as above (12).
REPLAYED = 34 + LAYERS * 2
# Seven products, two sums, views of heads and back (8). The results of norms, rotary embeddings
# and the gate (5), two of them seen as heads (2).
LAYER = 24
# Once, in the first layer: memory for what of a row's keys is not put together yet.
ATTENTION_PLAN = 1
# In every layer: views of queries, keys and values as C reads them (6), and the result.
ATTENTION = 7

# A product with A flattens and splits the input and multiplies. One with B flattens and splits the
# output and multiplies; five of a layer's seven take their columns of a product that they share.
ONE_ADAPTER = LAYERS * (A_PRODUCTS * 3 + B_PRODUCTS * 3 + 5)
# Many adapters may cost more operations than one, but each of them none.
MANY_ADAPTERS = 2 * ONE_ADAPTER
# The result of each product with A; those with B are added in place.
ONE_ADAPTER_ALLOCATES = LAYERS * A_PRODUCTS
# With many adapters, a second tensor for each product.
MANY_ADAPTERS_ALLOCATE = LAYERS * 2 * (A_PRODUCTS + B_PRODUCTS)

ADVICE = "what the limits mean, and when to change one, is said at the top of this file"


@pytest.fixture
def bare(model: LlamaForCausalLM) -> tuple[Base, ModelRunner]:
    """The same base in a runner of its own, into which no site was ever put."""

    base = adopt(copy.deepcopy(model))
    cache = KVCache(base.layers, MAX_ADAPTERS + 1, BLOCK_SIZE, base.dtype, base.device)
    return base, ModelRunner(base, cache, Rows(base.device))


def decoding(count: int) -> list[Scheduled]:
    """As `engine.decode` leaves them: four tokens of the prompt, two generated ones."""
    sequences = [trial_sequence(i, [5] * 6, [1 + i], Sampling()) for i in range(count)]
    for sequence in sequences:
        sequence.num_computed = 5
    return [Scheduled(sequence, 1) for sequence in sequences]


def difference(more: list[str], less: list[str]) -> dict[str, int]:
    counts = Counter(more)
    counts.subtract(less)
    return {operation: count for operation, count in counts.items() if count}


@pytest.mark.parametrize("count", [1, 5, MAX_ADAPTERS])
def test_a_step_of_the_base_is_the_base_alone(engine, bare, recorder, count) -> None:
    """All sites are there and all slots full, and none of it costs an operation."""
    engine.decode([None] * count)
    step = engine.step()
    with recorder() as alone:
        bare[1].run(decoding(count))
    assert step.operations == alone.operations, difference(step.operations, alone.operations)
    assert step.allocations == alone.allocations


def test_what_a_step_does_beside_the_model(bare, recorder) -> None:
    base, runner = bare
    with recorder() as step:
        runner.run(decoding(3))
    inputs = runner.batch(decoding(3)).send(Upload(base.device))
    with recorder() as forward:
        runner.logits(inputs, inputs.sampled_rows)
    base.set_attention(lambda module, query, *_, **__: (query.transpose(1, 2), None))
    with recorder() as model:
        runner.logits(inputs, inputs.sampled_rows)
    outside = difference(step.operations, forward.operations)
    attention = difference(forward.operations, model.operations)
    if native.available():
        operations = Counter(model.operations)
        assert operations.total() <= AROUND_THE_LAYERS + LAYERS * LAYER, (operations, ADVICE)
    assert sum(outside.values()) <= OUTSIDE_THE_MODEL, (outside, ADVICE)
    assert sum(attention.values()) <= ATTENTION_PLAN + LAYERS * ATTENTION, (attention, ADVICE)


def test_what_a_replayed_step_does_beside_its_graph(bare, recorder) -> None:
    base, runner = bare
    sites: Any = SimpleNamespace(
        num_slots=1,
        device=base.device,
        eager_slots=set(),
        growth=0,
        added_columns=lambda sampled: 0,
    )
    shape, buffers = StepShape(4, 4, decodes=True), StepBuffers(8, 4, 4, 64, base.device)
    graphs = StepGraphs((shape,), runner.logits, buffers, sites, lambda step: lambda: None)
    assert graphs.capture_base()
    runner.use(graphs)
    with recorder() as step:
        runner.run(decoding(3))
    counts = Counter(step.operations)
    assert counts["aten.copy_.default"] <= COPIES_BEFORE_A_REPLAY, (counts, ADVICE)
    assert counts.total() <= BESIDE_A_REPLAY, (counts, ADVICE)


@pytest.mark.parametrize(
    ("adapters", "operations", "allocations"),
    [
        ([0], ONE_ADAPTER, ONE_ADAPTER_ALLOCATES),
        ([0] * MAX_ADAPTERS, ONE_ADAPTER, ONE_ADAPTER_ALLOCATES),
        ([0, None], ONE_ADAPTER, ONE_ADAPTER_ALLOCATES),
        (range(8), MANY_ADAPTERS, MANY_ADAPTERS_ALLOCATE),
        (range(MAX_ADAPTERS), MANY_ADAPTERS, MANY_ADAPTERS_ALLOCATE),
        ([*range(15), None], MANY_ADAPTERS, MANY_ADAPTERS_ALLOCATE),
    ],
    ids=["one", "one in all rows", "one beside the base", "8", "16", "15 beside the base"],
)
def test_what_adapters_add_to_a_step(engine, adapters, operations, allocations) -> None:
    engine.decode([None] * len(adapters))
    base = engine.step()
    engine.decode(adapters)
    step = engine.step()
    added = difference(step.operations, base.operations)
    assert added, "adapters act"
    assert sum(added.values()) <= operations, (added, ADVICE)
    assert step.allocations - base.allocations <= allocations, ADVICE


@pytest.mark.skipif(not native.available(), reason="steps are recorded with a C compiler only")
def test_a_recorded_step_is_as_many_operations_with_adapters_as_without(replaying) -> None:
    steps = []
    for adapters in ([None] * 5, [0] * 5, range(5), [*range(15), None]):
        replaying.decode(adapters)
        for _ in range(STEPS_BEFORE):
            replaying.step()
        steps.append(replaying.step())
    base = Counter(steps[0].operations)
    assert base.total() <= REPLAYED, (base, ADVICE)
    for step in steps[1:]:
        assert step.operations == steps[0].operations, difference(
            step.operations, steps[0].operations
        )
        assert step.allocations == steps[0].allocations


def test_sixteen_adapters_are_as_many_operations_as_eight(engine) -> None:
    steps = []
    for count in (8, MAX_ADAPTERS):
        engine.decode(range(count))
        steps.append(engine.step())
    eight, sixteen = steps
    assert sixteen.operations == eight.operations, difference(sixteen.operations, eight.operations)
    assert sixteen.allocations == eight.allocations
