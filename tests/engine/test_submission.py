from dataclasses import replace

import pytest

from deltamux.engine.limits import Limits
from deltamux.engine.submission import Submissions
from deltamux.errors import FailedPrecondition, InvalidArgument
from deltamux.wire.messages import Classify, Sampling, Stopping, Submit

LIMITS = Limits(vocab_size=100, max_model_len=32, kv_cache_tokens=80)


def submit(prompt=(1, 2, 3), max_tokens=3, sampling=None, **fields):
    return Submit("r", tuple(prompt), sampling or Sampling(), Stopping(max_tokens), **fields)


def test_choices_differ_in_their_index_alone_and_follow_the_first():
    request = submit(n=3, adapter="a", adapter_path="/a", priority=2, deadline=1.5)
    first, *others = Submissions(LIMITS, seed=0).sequences(request, 10.0, "host")
    assert [other.index for other in others] == [1, 2]
    assert all(other.leader is first for other in others) and first.leader is None
    assert (first.arrival, first.deadline, first.tier) == (10.0, 11.5, "host")
    assert (first.adapter, first.adapter_path, first.priority) == ("a", "/a", 2)
    assert first.tokens == others[0].tokens and first.tokens is not others[0].tokens


@pytest.mark.parametrize(("caching", "salt"), [(True, "pepper"), (False, "r")])
def test_without_prefix_caching_each_request_has_a_salt_of_its_own(caching, salt):
    request = submit(cache_salt="pepper", n=2)
    sequences = Submissions(LIMITS, 0, prefix_caching=caching).sequences(request, 0.0, "")
    assert [sequence.cache_salt for sequence in sequences] == [salt, salt]


def test_what_the_cache_can_never_hold_is_refused():
    submissions = Submissions(replace(LIMITS, kv_cache_tokens=8), seed=0)
    assert submissions.sequences(submit(prompt=range(6), max_tokens=3), 0.0, "")
    with pytest.raises(InvalidArgument, match="need 9 tokens of KV cache; there are 8"):
        submissions.sequences(submit(prompt=range(6), max_tokens=4), 0.0, "")


@pytest.mark.parametrize(
    ("fields", "ids_below"),
    [
        ({"prompt": (1, 7, 2)}, 8),
        ({"prompt": (1, 150)}, 151),
        ({"prompt": (1,), "sampling": Sampling(logit_bias={170: 1.0})}, 171),
    ],
)
def test_an_adapter_may_know_more_tokens_than_the_base(fields, ids_below):
    """How many, the scheduler is told with the adapter's traits."""
    request = submit(**fields, adapter="a")
    (sequence,) = Submissions(LIMITS, seed=0).sequences(request, 0.0, "")
    assert sequence.ids_below == ids_below


@pytest.mark.parametrize(
    ("prompt", "adapter"), [((1, 100), ""), ((-1,), ""), ((-1,), "a"), ((1 << 31,), "a")]
)
def test_ids_that_are_nobodys(prompt, adapter):
    request = submit(prompt=prompt, adapter=adapter)
    with pytest.raises(InvalidArgument) as caught:
        Submissions(LIMITS, seed=0).sequences(request, 0.0, "")
    assert (caught.value.reason, caught.value.field) == ("TOKEN_ID_OUT_OF_RANGE", "token_ids")


def test_requests_without_a_seed_get_different_ones_repeatably():
    def seeds():
        submissions = Submissions(LIMITS, seed=3)
        unseeded = submit(sampling=Sampling(temperature=1.0))
        return [submissions.sequences(unseeded, 0.0, "")[0].sampling.seed for _ in range(3)]

    assert len(set(seeds())) == 3
    assert seeds() == seeds()
    (kept,) = Submissions(LIMITS, seed=3).sequences(submit(sampling=Sampling(seed=5)), 0.0, "")
    assert kept.sampling.seed == 5


def test_an_encoder_generates_nothing():
    submissions = Submissions(replace(LIMITS, generates=False, token_types=2), seed=0)
    with pytest.raises(FailedPrecondition) as caught:
        submissions.sequences(submit(), 0.0, "")
    assert caught.value.reason == "NO_GENERATION"
    pair = submit(pooling=Classify(), token_types=(0, 0, 1))
    (sequence,) = submissions.sequences(pair, 0.0, "")
    assert sequence.token_types == (0, 0, 1)
    for types in ((0, 1), (0, 0, 2), (0, -1, 0)):
        with pytest.raises(InvalidArgument, match="token_types"):
            submissions.sequences(submit(pooling=Classify(), token_types=types), 0.0, "")


def test_a_prompt_that_is_only_pooled_may_fill_the_context_and_the_cache():
    submissions = Submissions(replace(LIMITS, kv_cache_tokens=32), seed=0)
    pooled = submit(prompt=range(32), max_tokens=1, pooling=Classify())
    (sequence,) = submissions.sequences(pooled, 0.0, "")
    assert (sequence.pooling, sequence.call) == (Classify(), "Classify")
    with pytest.raises(InvalidArgument, match="33 tokens, not 1 to 32"):
        submissions.sequences(submit(prompt=range(33), pooling=Classify()), 0.0, "")
    with pytest.raises(InvalidArgument, match="not 1 to 31"):
        submissions.sequences(submit(prompt=range(32), max_tokens=1), 0.0, "")
    small = Submissions(replace(LIMITS, kv_cache_tokens=8), seed=0)
    with pytest.raises(InvalidArgument, match="need 9 tokens of KV cache"):
        small.sequences(submit(prompt=range(9), max_tokens=1, pooling=Classify()), 0.0, "")
