"""What ends early or goes wrong: who is told, who goes on, and what is given back."""

from __future__ import annotations

import pytest
import torch

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.engine.outcome import NonFinite
from deltamux.errors import InvalidArgument, ResourceExhausted
from deltamux.wire.messages import Cancel, RequestFailed, Sampling


def test_what_led_to_non_finite_logits_is_computed_again(setup, submit):
    served = setup()
    sound = served.runner.outcome
    served.runner.outcome = lambda sequence: NonFinite()
    served.step(submit("bad", prompt=range(10)))
    served.runner.outcome = sound
    served.step(submit("good", prompt=range(10)))
    assert served.link.progress("good")[0].first.cached_prompt_tokens == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": ()}, "PROMPT_LENGTH"),
        ({"prompt": range(32)}, "PROMPT_LENGTH"),
        ({"prompt": (1, 100)}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"prompt": (-1,)}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"max_tokens": 0}, "INVALID_ARGUMENT"),
        ({"n": 0}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(logit_bias={100: 1.0})}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"sampling": Sampling(logit_bias={1: float("nan")})}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(temperature=float("nan"))}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(temperature=float("inf"))}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(top_p=0.0)}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(top_k=-1)}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(min_p=2.0)}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(presence_penalty=float("inf"))}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(seed=1 << 63)}, "INVALID_ARGUMENT"),
        ({"sampling": Sampling(logprobs=101)}, "INVALID_ARGUMENT"),
    ],
)
def test_what_is_out_of_range_is_refused_and_the_others_go_on(setup, submit, fields, reason):
    served = setup()
    served.step(submit("good", max_tokens=1), submit("bad", **fields))
    (failed,) = served.link.told(RequestFailed)
    assert (failed.request_id, failed.code, failed.reason) == ("bad", "INVALID_ARGUMENT", reason)
    assert served.link.progress("good")[0].finish == "length"
    assert served.is_empty()


def test_a_deadline_ends_a_request_running_or_waiting(setup, submit):
    served = setup(load_polls=99)
    served.step(submit("running", max_tokens=20, deadline=5.0))
    served.step(submit("waiting", adapter="cold", deadline=4.0))
    served.now += 5.0
    served.step()
    failed = served.link.told(RequestFailed)
    assert {(f.request_id, f.code) for f in failed} == {
        ("running", "DEADLINE_EXCEEDED"),
        ("waiting", "DEADLINE_EXCEEDED"),
    }
    assert served.is_empty()


def test_cancel_frees_all_at_the_next_step(setup, submit):
    served = setup()
    served.step(submit(n=2, adapter="a", max_tokens=20), times=2)
    assert len(served.scheduler.running) == 2
    served.step(Cancel("r"))
    assert served.is_empty()
    assert served.link.sent[-1].progress == ()


def test_a_malformed_adapter_is_a_failed_precondition_with_its_reason(setup, submit):
    served = setup()
    served.adapters.broken["bad"] = InvalidArgument("rank is 0", reason="BAD_RANK")
    served.adapters.broken["full"] = ResourceExhausted("no host memory")
    served.step(submit("r", adapter="bad", n=2), submit("s", adapter="full"), submit("good"))
    assert served.link.told(RequestFailed) == [
        RequestFailed("r", "FAILED_PRECONDITION", "BAD_RANK", "rank is 0"),
        RequestFailed("s", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", "no host memory"),
    ]
    assert served.link.progress("good")
    served.step(times=3)
    assert served.is_empty()


@pytest.mark.parametrize(("adapter", "code"), [("a", "FAILED_PRECONDITION"), ("", "INTERNAL")])
def test_non_finite_logits_fail_their_request_alone(setup, submit, adapter, code):
    served = setup()
    sound = served.runner.outcome
    served.runner.outcome = lambda s: NonFinite() if s.request_id == "bad" else sound(s)
    served.step(submit("bad", adapter=adapter, n=2), submit("good", adapter="a"), times=3)
    (failed,) = served.link.told(RequestFailed)
    assert (failed.request_id, failed.code, failed.reason) == ("bad", code, "NON_FINITE_OUTPUT")
    assert served.link.progress("bad") == []
    assert served.link.progress("good")[-1].finish == "length"
    assert served.is_empty()


@pytest.mark.parametrize("when", ["launch", "collect"])
def test_a_step_without_memory_is_run_in_parts_and_nobody_notices(setup, submit, when):
    served = setup()
    served.step(submit("small"))
    served.runner.errors[when] = torch.OutOfMemoryError("no more")
    served.step(submit("large", prompt=range(12)), times=4)
    assert served.link.told(RequestFailed) == []
    for request_id in ("small", "large"):
        assert [p.token_ids[0] for p in served.link.progress(request_id)] == [50, 51, 52]
    assert served.is_empty()


def test_who_starves_fails_alone_with_all_its_choices(setup, submit):
    served = setup()
    launch = served.runner.launch

    def scarce(scheduled):
        if any(item.sequence.request_id == "hungry" for item in scheduled):
            raise MemoryError
        return launch(scheduled)

    served.runner.launch = scarce
    served.step(submit("sated", max_tokens=9), submit("hungry", adapter="a", n=2), times=9)
    assert served.link.told(RequestFailed) == [
        RequestFailed(
            "hungry", "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "there is not enough memory for it"
        )
    ]
    assert served.link.progress("hungry") == []
    assert served.link.progress("sated")[-1].finish == "length"
    assert served.is_empty()
    served.runner.launch = launch
    served.step(submit("hungry", adapter="a"), times=4)
    assert served.link.progress("hungry")[-1].finish == "length"


def test_an_adapters_pages_without_memory_fail_its_request_alone(setup, submit):
    served = setup()
    served.adapters.virtuals = {"prefix": Virtual(5, computed=False)}
    fill, filled = served.prefixes.fill, []

    def scarce(slot, blocks, first):
        filled.append(slot)
        if len(filled) == 1:
            raise torch.OutOfMemoryError
        fill(slot, blocks, first)

    served.prefixes.fill = scarce
    served.step(submit("first", adapter="prefix"), submit("other"), times=4)
    (failed,) = served.link.told(RequestFailed)
    assert (failed.request_id, failed.reason) == ("first", "OUT_OF_MEMORY")
    assert served.link.progress("other")[-1].finish == "length"
    assert served.is_empty()
    served.step(submit("second", adapter="prefix"), times=4)
    assert served.link.progress("second")[-1].finish == "length"


@pytest.mark.parametrize("when", ["launch", "collect"])
def test_any_other_error_of_the_forward_pass_ends_the_engine(setup, submit, when):
    served = setup()
    served.runner.errors[when] = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        served.step(submit())


def test_nothing_counts_as_computed_that_failed_when_it_was_collected(setup, submit):
    served = setup()
    served.step(submit(prompt=range(12)))
    served.runner.errors["collect"] = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        served.step()
    (sequence,) = served.scheduler.running
    assert (sequence.num_computed, sequence.num_generated) == (12, 1)


def test_a_cancel_that_comes_while_a_step_is_under_way_waits_for_it(setup, submit):
    """Until then the device writes to its blocks, and reads from its adapter's slot."""
    served, held = setup(), []
    served.step(submit(adapter="a", max_tokens=9), submit("other", max_tokens=2))
    served.runner.launched = lambda: served.link.inbox.append(Cancel("r"))
    served.runner.landing = lambda: held.append(
        (served.blocks.num_used, served.adapters.leases["a"])
    )
    served.step()
    assert held == [(2, 1)]
    assert served.link.progress("r")[-1].token_ids == (51,)
    served.step()
    assert len(served.link.progress("r")) == 2
    assert served.link.progress("other")[-1].finish == "length"
    assert served.is_empty()
