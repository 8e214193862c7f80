import pytest
import torch

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.config import EngineConfig
from deltamux.engine.engine import _LULL, Engine
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.limits import Limits
from deltamux.engine.outcome import NonFinite, SampledToken
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.submission import Submissions
from deltamux.errors import InvalidArgument, ResourceExhausted
from deltamux.wire.messages import (
    AdapterDropped,
    Cancel,
    Classify,
    DropAdapter,
    LoadAdapter,
    Logprob,
    PinAdapter,
    Pooled,
    RequestFailed,
    Sampling,
    Shutdown,
    StepDone,
    Stopping,
    Submit,
    TokenLogprobs,
)

STOP = 9
CONFIG = EngineConfig("", block_size=4, max_num_seqs=8, max_num_batched_tokens=16)
LIMITS = Limits(vocab_size=100, max_model_len=32, kv_cache_tokens=80)


class Runner:
    """Each sequence's next token is its length, unless `outcome` decides otherwise."""

    def __init__(self):
        self.outcome = lambda sequence: SampledToken(50 + sequence.num_generated, None)
        # What the next step raises, when it is launched and when it is collected.
        self.errors = {}
        # What happens while a step is under way: as it begins, and before it ends.
        self.launched = self.landing = lambda: None

    def launch(self, scheduled):
        self._raise("launch")
        self.launched()
        return lambda: self._collect(scheduled)

    def _collect(self, scheduled):
        self.landing()
        self._raise("collect")
        return [self.outcome(item.sequence) for item in scheduled if item.yields]

    def _raise(self, when):
        if when in self.errors:
            raise self.errors.pop(when)


class Setup:
    def __init__(self, link, adapters, prefixes, ahead, num_blocks=20):
        self.now = 100.0
        self.link, self.runner, self.adapters = link, Runner(), adapters
        self.prefixes = prefixes
        # What there is to do at rest.
        self.chores = []
        self.blocks = BlockManager(BlockAllocator(num_blocks + 1), CONFIG.block_size, prefixes)
        self.scheduler = Scheduler(CONFIG, LIMITS, self.blocks, adapters)
        self.engine = Engine(
            self.link,
            Submissions(LIMITS, seed=0),
            self.scheduler,
            self.blocks,
            adapters,
            self.runner,
            clock=lambda: self.now,
            ahead=ahead,
            next_chore=lambda: self._do if self.chores else None,
        )

    def _do(self):
        self.chores.pop(0)()

    def step(self, *messages, times=1):
        self.link.inbox += messages
        for _ in range(times):
            self.engine.step()
        # What the last step brought would be sent by the next one.
        self.engine.settle()

    def is_empty(self):
        return (
            not self.scheduler.running
            and not self.scheduler.waiting
            and not self.blocks.num_used
            and not self.adapters.leases.total()
        )


@pytest.fixture(params=[False, True], ids=["lands at once", "runs ahead"])
def setup(request, fake_link, fake_adapters, fake_prefixes):
    def make(slots=2, load_polls=0):
        adapters = fake_adapters(slots, load_polls)
        return Setup(fake_link(), adapters, fake_prefixes(), ahead=request.param)

    return make


def submit(request_id="r", prompt=(1, 2, 3), max_tokens=3, min_tokens=0, sampling=None, **fields):
    stopping = Stopping(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=(STOP,))
    return Submit(request_id, tuple(prompt), sampling or Sampling(seed=1), stopping, **fields)


def test_a_request_from_submit_to_finish(setup):
    served = setup()
    served.step(submit(adapter="a"), times=3)
    assert [
        (p.index, p.token_ids, p.finish, p.first is not None) for p in served.link.progress("r")
    ] == [(0, (50,), "", True), (0, (51,), "", False), (0, (52,), "length", False)]
    assert served.is_empty()


def test_what_is_pooled_ends_its_request(setup):
    served, pooled = setup(), Pooled(b"numbers")
    served.runner.outcome = lambda sequence: pooled
    served.step(submit(adapter="a", pooling=Classify()))
    (progress,) = served.link.progress("r")
    assert (progress.pooled, progress.finish, progress.token_ids) == (pooled, "stop", ())
    assert progress.first is not None and progress.first.tier == "disk"
    assert served.is_empty()


def test_every_step_sends_one_message_with_the_state(setup):
    served = setup()
    served.step(submit("r", adapter="a"), submit("s"))
    (done,) = served.link.told(StepDone)
    assert [p.request_id for p in done.progress] == ["r", "s"]
    assert (done.stats.running, done.stats.waiting) == (2, 0)
    assert (done.stats.step_rows, done.stats.step_adapters) == (6, 1)
    assert (done.stats.kv_blocks_used, done.stats.kv_blocks_total) == (2, 20)
    served.step(times=4)
    assert served.link.sent[-1].stats.running == 0
    assert served.link.sent[-1].stats.step_rows == 0


def test_stop_token_ends_it_only_after_min_tokens(setup):
    served = setup()
    served.runner.outcome = lambda sequence: SampledToken(STOP, None)
    served.step(submit(max_tokens=10, min_tokens=3), times=3)
    assert [p.finish for p in served.link.progress("r")] == ["", "", "stop"]
    assert served.is_empty()


def test_the_context_ends_it_with_length(setup):
    served = setup()
    served.step(submit(prompt=range(30), max_tokens=10), times=5)
    assert [p.finish for p in served.link.progress("r")] == ["", "length"]


def test_virtual_tokens_take_room_in_the_context(setup):
    served = setup()
    served.adapters.virtuals["a"] = Virtual(28)
    served.step(submit(prompt=range(2), adapter="a", max_tokens=10), times=9)
    assert [p.finish for p in served.link.progress("r")] == ["", "length"]
    assert served.link.progress("r")[0].first.cached_prompt_tokens == 0
    assert served.is_empty()


def test_a_stop_token_as_the_last_allowed_one_is_a_stop(setup):
    served = setup()
    served.runner.outcome = lambda sequence: SampledToken(STOP, None)
    served.step(submit(max_tokens=1))
    assert [p.finish for p in served.link.progress("r")] == ["stop"]


def test_first_token_tells_how_much_of_the_prompt_was_there(setup):
    served = setup()
    served.step(submit("r", prompt=range(10), n=2), times=2)
    served.step(submit("s", prompt=range(10)), submit("t", prompt=range(10), cache_salt="t"))
    cached = [served.link.progress(name)[0].first.cached_prompt_tokens for name in "rst"]
    assert cached == [0, 8, 0]
    stats = served.link.sent[-1].stats
    assert (stats.prefix_queries, stats.prefix_hits) == (30, 8)


def test_what_led_to_non_finite_logits_is_computed_again(setup):
    served = setup()
    sound = served.runner.outcome
    served.runner.outcome = lambda sequence: NonFinite()
    served.step(submit("bad", prompt=range(10)))
    served.runner.outcome = sound
    served.step(submit("good", prompt=range(10)))
    assert served.link.progress("good")[0].first.cached_prompt_tokens == 0


def test_logprobs_go_along(setup):
    served = setup()
    logprobs = TokenLogprobs(Logprob(5, -0.5), (Logprob(5, -0.5),))
    served.runner.outcome = lambda sequence: SampledToken(5, logprobs)
    served.step(submit(max_tokens=1))
    (progress,) = served.link.progress("r")
    assert progress.logprobs == (logprobs,)


def test_choices_are_told_apart(setup):
    served = setup()
    served.step(submit(n=3, max_tokens=2), times=4)
    finished = [p.index for p in served.link.progress("r") if p.finish == "length"]
    assert sorted(finished) == [0, 1, 2]
    assert sum(p.first is not None for p in served.link.progress("r")) == 3
    assert served.is_empty()


def test_first_token_tells_queueing_from_the_adapters_load(setup):
    served = setup(load_polls=2)
    for number in range(8):
        served.step(submit(f"busy-{number}", max_tokens=20))
    served.step(submit(adapter="a"))
    served.now += 3.0
    served.step(*(Cancel(f"busy-{number}") for number in range(8)))
    served.now += 2.0
    served.step(times=3)
    first = served.link.progress("r")[0].first
    assert (first.queue, first.adapter_load, first.tier) == (3.0, 2.0, "disk")
    served.step(submit("again", adapter="a"))
    first = served.link.progress("again")[0].first
    assert (first.queue, first.adapter_load, first.tier) == (0.0, 0.0, "device")


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
def test_what_is_out_of_range_is_refused_and_the_others_go_on(setup, fields, reason):
    served = setup()
    served.step(submit("good", max_tokens=1), submit("bad", **fields))
    (failed,) = served.link.told(RequestFailed)
    assert (failed.request_id, failed.code, failed.reason) == ("bad", "INVALID_ARGUMENT", reason)
    assert served.link.progress("good")[0].finish == "length"
    assert served.is_empty()


def test_a_deadline_ends_a_request_running_or_waiting(setup):
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


def test_cancel_frees_all_at_the_next_step(setup):
    served = setup()
    served.step(submit(n=2, adapter="a", max_tokens=20), times=2)
    assert len(served.scheduler.running) == 2
    served.step(Cancel("r"))
    assert served.is_empty()
    assert served.link.sent[-1].progress == ()


def test_a_malformed_adapter_is_a_failed_precondition_with_its_reason(setup):
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
def test_non_finite_logits_fail_their_request_alone(setup, adapter, code):
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
def test_a_step_without_memory_is_run_in_parts_and_nobody_notices(setup, when):
    served = setup()
    served.step(submit("small"))
    served.runner.errors[when] = torch.OutOfMemoryError("no more")
    served.step(submit("large", prompt=range(12)), times=4)
    assert served.link.told(RequestFailed) == []
    for request_id in ("small", "large"):
        assert [p.token_ids[0] for p in served.link.progress(request_id)] == [50, 51, 52]
    assert served.is_empty()


def test_who_starves_fails_alone_with_all_its_choices(setup):
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


def test_an_adapters_pages_without_memory_fail_its_request_alone(setup):
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
def test_any_other_error_of_the_forward_pass_ends_the_engine(setup, when):
    served = setup()
    served.runner.errors[when] = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        served.step(submit())


def test_nothing_counts_as_computed_that_failed_when_it_was_collected(setup):
    served = setup()
    served.step(submit(prompt=range(12)))
    served.runner.errors["collect"] = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        served.step()
    (sequence,) = served.scheduler.running
    assert (sequence.num_computed, sequence.num_generated) == (12, 1)


@pytest.mark.parametrize("setup", [False], indirect=True)
def test_a_step_is_told_while_the_next_one_is_under_way(setup):
    served, sent = setup(), []
    served.runner.landing = lambda: sent.append(len(served.link.progress("r")))
    served.link.inbox.append(submit(max_tokens=3))
    for _ in range(3):
        served.engine.step()
    assert sent == [0, 1, 2]
    served.engine.step()
    assert [p.finish for p in served.link.progress("r")] == ["", "", "length"]


@pytest.mark.parametrize("setup", [False], indirect=True)
def test_what_is_told_keeps_its_order(setup):
    """The failure comes behind the tokens of the step before it, which are sent late."""
    served = setup()
    served.link.inbox.append(submit(max_tokens=9, deadline=5.0))
    served.engine.step()
    served.now += 5.0
    served.engine.step()
    kinds = [type(message) for message in served.link.sent]
    assert kinds == [StepDone, RequestFailed, StepDone]
    assert [p.token_ids for p in served.link.sent[0].progress] == [(50,)]


def test_a_cancel_that_comes_while_a_step_is_under_way_waits_for_it(setup):
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


def test_orders_for_adapters_are_passed_on_and_news_are_told(setup):
    served = setup()
    served.adapters.poll = lambda: [AdapterDropped("d")]
    served.step(LoadAdapter("a", "/p", True, True), PinAdapter("b", "/q", False), DropAdapter("d"))
    assert served.adapters.orders == [
        ("load", "a", "/p", True, True),
        ("pin", "b", "/q", False),
        ("drop", "d"),
    ]
    assert served.link.told(AdapterDropped) == [AdapterDropped("d")]


def test_it_sleeps_only_without_work_and_until_the_next_deadline(setup):
    served = setup(load_polls=99)
    served.step()
    assert served.link.waits == [None]
    served.step(submit(max_tokens=1))
    # Something ran: what it gave back may let a waiting request in.
    served.step()
    served.step(submit(adapter="cold", deadline=4.0))
    served.now += 1.0
    served.step()
    served.now += 9.0
    served.step()
    assert served.link.waits == [None, None, 0.0, None, 3.0, 0.0]


def test_all_chores_are_done_before_it_sleeps(setup):
    served, done = setup(), []
    served.chores = [lambda: done.append("first"), lambda: done.append("second")]
    served.step()
    assert done == ["first", "second"]
    assert served.link.waits == [_LULL, _LULL, None]


def test_who_asks_during_a_chore_waits_for_no_other(setup):
    served, done = setup(), []
    request = submit(max_tokens=1)
    served.chores = [lambda: served.link.inbox.append(request), lambda: done.append("second")]
    served.step()
    assert [p.finish for p in served.link.progress("r")] == ["length"]
    assert not done
    served.step(times=2)
    assert done == ["second"]


def test_chores_wait_for_sequences_and_adapters(setup):
    served, done = setup(load_polls=99), []
    served.chores = [lambda: done.append("at last")]
    served.step(submit("running", max_tokens=3), times=3)
    served.step(submit("waiting", adapter="cold"), times=3)
    served.step(Cancel("waiting"))
    served.adapters.pending_loads = 1
    served.step(times=2)
    assert not done
    served.adapters.pending_loads = 0
    served.step()
    assert done == ["at last"]


def test_shutdown_ends_the_loop(setup):
    served = setup()
    served.link.inbox.append(Shutdown())
    served.engine.run()
    assert served.engine.stopped


@pytest.fixture
def flying(fake_link, fake_adapters, fake_prefixes):
    """An engine that runs ahead, and what its runner did, in order."""

    def make(num_blocks=20):
        served = Setup(fake_link(), fake_adapters(2), fake_prefixes(), True, num_blocks)
        events = []
        served.runner.launched = lambda: events.append("launch")
        served.runner.landing = lambda: events.append("land")
        return served, events

    return make


def steps(served, *messages, times=1):
    """Without waiting for what is under way behind them."""
    served.link.inbox += messages
    for _ in range(times):
        served.engine.step()


def test_the_next_step_is_launched_before_the_one_before_has_landed(flying):
    served, events = flying()
    steps(served, submit(max_tokens=3), times=3)
    assert events == ["launch", "launch", "land", "launch", "land"]
    # Nothing of it is left to be launched: nobody waits.
    steps(served)
    assert events[5:] == ["land"]
    assert [p.token_ids[0] for p in served.link.progress("r")] == [50, 51, 52]
    assert served.is_empty()
    # What it gave back may let a waiting request in: only the step after waits for news.
    steps(served, times=2)
    assert served.link.waits == [None, 0.0, 0.0, 0.0, 0.0, None]


def test_what_has_landed_is_told_while_the_next_one_is_under_way(flying):
    served, _ = flying()
    steps(served, submit(max_tokens=9), times=2)
    assert [p.token_ids for p in served.link.progress("r")] == [(50,)]
    assert len(served.link.told(StepDone)) == 1


def test_what_stops_under_a_step_keeps_what_it_holds_until_that_has_landed(flying):
    served, events = flying()
    served.runner.outcome = lambda sequence: SampledToken(STOP)
    steps(served, submit(adapter="a", max_tokens=9), times=2)
    assert [(p.token_ids, p.finish) for p in served.link.progress("r")] == [((STOP,), "stop")]
    assert served.scheduler.running == []
    assert (served.blocks.num_used, served.adapters.leases["a"]) == (1, 1)
    steps(served)
    assert events == ["launch", "launch", "land", "land"]
    assert len(served.link.progress("r")) == 1
    assert served.is_empty()
    assert served.link.sent[-1].stats.kv_blocks_used == 0


def test_a_deadline_under_a_step_ends_it_at_once_and_lets_go_later(flying):
    served, _ = flying()
    steps(served, submit(adapter="a", max_tokens=9, deadline=5.0))
    served.now += 5.0
    served.runner.landing = lambda: held.append((served.blocks.num_used, served.link.sent[:]))
    held = []
    steps(served)
    ((blocks, (failed,)),) = held
    assert (blocks, failed.code) == (1, "DEADLINE_EXCEEDED")
    assert served.link.progress("r") == []
    assert served.is_empty()


@pytest.mark.parametrize(
    "asked",
    [
        submit(sampling=Sampling(seed=1, repetition_penalty=1.5)),
        submit(sampling=Sampling(seed=1, presence_penalty=1.5)),
        submit(sampling=Sampling(seed=1, frequency_penalty=1.5)),
    ],
)
def test_a_step_lands_first_whose_tokens_the_next_one_needs(flying, asked):
    served, events = flying()
    steps(served, submit("other", max_tokens=5), times=2)
    steps(served, asked, times=3)
    assert events[:3] == ["launch", "launch", "land"]
    assert events[3:] == ["launch", "land", "land", "launch", "land", "launch", "land"]


def test_a_step_lands_first_in_which_something_is_pooled(flying):
    served, events = flying()
    served.runner.outcome = lambda s: Pooled(b"") if s.pooling else SampledToken(50)
    steps(served, submit("other", max_tokens=9), submit(adapter="a", pooling=Classify()))
    assert events == ["launch", "land"]
    steps(served, times=2)
    assert events[2:] == ["launch", "launch", "land"]


def test_a_step_lands_first_where_somebody_would_be_preempted(flying):
    """Two sequences of four places each; both grow into the third block."""
    served, events = flying(num_blocks=3)
    steps(served, submit("a", prompt=range(2), max_tokens=6), submit("b", prompt=range(2)))
    assert events == ["launch"]
    steps(served, times=2)
    assert events[1:] == ["launch", "land", "launch", "land", "land"]
    assert served.scheduler.num_preemptions == 0
    served.step(times=9)
    assert [len(served.link.progress(name)) for name in "ab"] == [6, 3]
    assert served.is_empty()


def test_a_launch_without_memory_waits_for_the_step_before_and_runs_in_parts(flying):
    served, events = flying()
    steps(served, submit("a", max_tokens=4), submit("b", max_tokens=4))
    served.runner.errors["launch"] = torch.OutOfMemoryError("no more")
    steps(served)
    assert events == ["launch", "land", "launch", "land", "launch", "land"]
    served.step(times=4)
    assert served.link.told(RequestFailed) == []
    for name in "ab":
        assert [p.token_ids[0] for p in served.link.progress(name)] == [50, 51, 52, 53]
    assert served.is_empty()


def test_what_was_launched_behind_a_step_without_memory_counts_for_nothing(flying):
    served, events = flying()
    steps(served, submit("a", max_tokens=4), submit("b", max_tokens=4))
    served.runner.errors["collect"] = torch.OutOfMemoryError("no more")
    steps(served)
    # Both are waited for; then the first runs in two parts.
    assert events == ["launch", "launch", "land", "land", "launch", "land", "launch", "land"]
    assert [s.num_computed for s in served.scheduler.running] == [3, 3]
    served.step(times=4)
    for name in "ab":
        assert [p.token_ids[0] for p in served.link.progress(name)] == [50, 51, 52, 53]
    assert served.is_empty()


def test_what_has_ended_does_not_starve_for_want_of_memory(flying):
    served, _ = flying()
    steps(served, submit(prompt=(1,), max_tokens=4))
    served.runner.errors["collect"] = torch.OutOfMemoryError("no more")
    steps(served, Cancel("r"), submit("other", max_tokens=4))
    served.step(times=4)
    assert served.link.told(RequestFailed) == [] and served.link.progress("r") == []
    assert [p.token_ids[0] for p in served.link.progress("other")] == [50, 51, 52, 53]
    assert served.is_empty()


def test_shutdown_lands_and_tells_what_is_under_way(flying):
    served, events = flying()
    steps(served, submit(max_tokens=9))
    served.link.inbox.append(Shutdown())
    served.engine.run()
    assert events == ["launch", "launch", "land", "land"]
    assert [p.token_ids[0] for p in served.link.progress("r")] == [50, 51]


def test_a_step_takes_from_when_the_device_is_done_with_the_one_before(flying):
    served, _ = flying()

    def compute():
        served.now += 2.0

    served.runner.landing = compute
    steps(served, submit(max_tokens=3), times=4)
    assert [done.stats.step_seconds for done in served.link.told(StepDone)] == [2.0, 2.0, 2.0]
