"""The engine process over its socket, held to transformers and PEFT."""

import os
import signal

import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file

from deltamux.store.digest import content_digest
from deltamux.wire.messages import (
    AdapterDropped,
    AdapterFailed,
    Cancel,
    DropAdapter,
    Sampling,
)

PROMPTS = [tuple(range(start, start + length)) for start, length in ((3, 5), (40, 23), (9, 70))]
PROMPT = PROMPTS[1]


def test_greedy_tokens_equal_those_of_transformers_and_peft(engine, world, submit):
    """More adapters than slots, beside the base, all at once."""
    cases = [(prompt, adapter) for prompt in PROMPTS for adapter in ("", *world.adapters)]
    submits = [submit(f"greedy-{n}", *case) for n, case in enumerate(cases)]
    for (prompt, adapter), answer in zip(cases, engine.run(*submits), strict=True):
        assert answer.tokens == {0: world.greedy(prompt, 8, adapter)}, (len(prompt), adapter)
        assert answer.finish == {0: "length"}
    assert engine.stats.device_evictions > 0


def test_requests_that_arrive_while_others_run_change_nothing(engine, world, submit):
    adapters = ["plain", "", "large", "plain"]
    for number, adapter in enumerate(adapters):
        engine.send(submit(f"staggered-{number}", PROMPTS[number % 3], adapter, max_tokens=24))
        answer = engine.answers[f"staggered-{number}"]
        engine.until(lambda answer=answer: answer.tokens)
    answers = [engine.answers[f"staggered-{number}"] for number in range(4)]
    engine.until(lambda: all(answer.finish for answer in answers))
    for number, (adapter, answer) in enumerate(zip(adapters, answers, strict=True)):
        assert answer.tokens[0] == world.greedy(PROMPTS[number % 3], 24, adapter)


def test_recomputation_after_preemption_changes_nothing(engine, world, submit):
    """Together they need about twice the blocks that there are."""
    before = engine.stats.preemptions
    adapters = ["plain", "", "large", "", "plain", "large", "", ""]
    submits = [
        submit(f"pressed-{n}", tuple(range(n, n + 12)), adapter, max_tokens=100)
        for n, adapter in enumerate(adapters)
    ]
    answers = engine.run(*submits)
    assert engine.stats.preemptions > before
    for request, adapter, answer in zip(submits, adapters, answers, strict=True):
        assert answer.tokens[0] == world.greedy(request.prompt, 100, adapter)
    assert engine.is_quiet()


def test_choices_are_those_of_each_alone(engine, submit):
    """A seed gives the same tokens with other choices and requests around, or without."""
    drawn = Sampling(temperature=1.0, seed=7)
    (alone,) = engine.run(submit("alone", PROMPT, "plain", sampling=drawn, n=3))
    noise = [submit(f"noise-{n}", PROMPTS[2], "large", max_tokens=30) for n in range(3)]
    *_, among = engine.run(*noise, submit("among", PROMPT, "plain", sampling=drawn, n=3))
    assert among.tokens == alone.tokens
    assert len({tuple(tokens) for tokens in alone.tokens.values()}) == 3


def test_a_greedy_request_has_equal_choices(engine, world, submit):
    (answer,) = engine.run(submit("equal", PROMPT, "large", n=3))
    assert list(answer.tokens.values()) == [world.greedy(PROMPT, 8, "large")] * 3


def test_first_token_tells_where_the_adapter_was(engine, world, submit):
    _drop(engine, world, "small")
    (cold,) = engine.run(submit("cold", PROMPT, "small"))
    (warm,) = engine.run(submit("warm", PROMPT, "small"))
    (base,) = engine.run(submit("base", PROMPT))
    assert [a.first[0].tier for a in (cold, warm, base)] == ["disk", "device", ""]
    assert cold.first[0].adapter_load > 0
    assert warm.first[0].adapter_load == base.first[0].adapter_load == 0


def _drop(engine, world, adapter):
    """Answered only when no lease is left."""
    engine.others.clear()
    digest = world.adapters[adapter].digest
    engine.send(DropAdapter(digest))
    engine.until(lambda: AdapterDropped(digest) in engine.others)


def _completes(engine, submit):
    engine.run(submit("life", PROMPT, "plain"))


def _completes_with_choices(engine, submit):
    engine.run(submit("life", PROMPT, "plain", n=4))


def _is_cancelled_at_once(engine, submit):
    engine.send(submit("life", PROMPT, "plain"), Cancel("life"))


def _is_cancelled_while_its_adapter_loads(engine, submit):
    engine.send(submit("life", PROMPT, "plain"))
    engine.until(lambda: engine.stats.waiting)
    engine.send(Cancel("life"))


def _is_cancelled_in_the_queue(engine, submit):
    # None is over before the last of them runs.
    engine.send(*(submit(f"busy-{n}", PROMPT, "large", max_tokens=200) for n in range(8)))
    engine.until(lambda: engine.stats.running == 8)
    engine.send(submit("life", PROMPT, "plain"))
    engine.until(lambda: engine.stats.waiting)
    engine.send(Cancel("life"), *(Cancel(f"busy-{n}") for n in range(8)))


def _is_cancelled_during_prefill(engine, submit):
    engine.send(submit("life", tuple(range(100)), "plain"))
    engine.until(lambda: engine.stats.running and not engine.answers["life"].tokens)
    engine.send(Cancel("life"))


def _is_cancelled_while_decoding(engine, submit):
    engine.send(submit("life", PROMPT, "plain", max_tokens=80, n=3))
    engine.until(lambda: len(engine.answers["life"].tokens) == 3)
    engine.send(Cancel("life"))


def _loses_some_choices(engine, submit):
    engine.send(submit("life", PROMPT, "plain", max_tokens=20, n=3))
    engine.until(lambda: len(engine.answers["life"].tokens) == 3)
    engine.send(Cancel("life", (0, 2)))
    engine.until(lambda: 1 in engine.answers["life"].finish)


def _meets_its_deadline_while_decoding(engine, submit):
    engine.send(submit("life", PROMPT, "plain", max_tokens=200, deadline=0.05))
    engine.until(lambda: engine.answers["life"].error)
    assert engine.answers["life"].error.code == "DEADLINE_EXCEEDED"


def _has_no_time_at_all(engine, submit):
    engine.send(submit("life", PROMPT, "plain", deadline=0.0))
    engine.until(lambda: engine.answers["life"].error)
    assert engine.answers["life"].error.code == "DEADLINE_EXCEEDED"


def _is_refused(engine, submit):
    (answer,) = engine.run(submit("life", (1, 5000), "plain"))
    assert (answer.error.code, answer.error.reason) == ("INVALID_ARGUMENT", "TOKEN_ID_OUT_OF_RANGE")


def _is_swapped_away_while_it_runs(engine, submit):
    request = submit("life", PROMPT, "plain", max_tokens=40)
    engine.send(request)
    engine.until(lambda: engine.answers["life"].tokens)
    engine.others.clear()
    engine.send(DropAdapter(request.adapter))
    engine.until(lambda: AdapterDropped(request.adapter) in engine.others)
    assert len(engine.answers["life"].tokens[0]) == 40


@pytest.mark.parametrize(
    "lifecycle",
    [
        _completes,
        _completes_with_choices,
        _is_cancelled_at_once,
        _is_cancelled_while_its_adapter_loads,
        _is_cancelled_in_the_queue,
        _is_cancelled_during_prefill,
        _is_cancelled_while_decoding,
        _loses_some_choices,
        _meets_its_deadline_while_decoding,
        _has_no_time_at_all,
        _is_refused,
        _is_swapped_away_while_it_runs,
    ],
)
def test_however_a_request_ends_nothing_stays_behind(engine, world, submit, lifecycle):
    _drop(engine, world, "plain")
    lifecycle(engine, submit)
    engine.until(engine.is_quiet)
    _drop(engine, world, "plain")
    engine.refresh()
    assert engine.is_quiet()


def test_files_that_differ_from_their_digest_fail_their_request_alone(
    engine, world, submit, tmp_path
):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    engine.others.clear()
    bad = structs.replace(submit("bad", PROMPT), adapter="0" * 64, adapter_path=str(tmp_path))
    answer, good = engine.run(bad, submit("good", PROMPT, "plain"))
    assert (answer.error.code, answer.tokens) == ("DATA_LOSS", {})
    assert good.tokens[0] == world.greedy(PROMPT, 8, "plain")
    assert engine.told(AdapterFailed)


@pytest.fixture(scope="module")
def overflowing(world, tmp_path_factory):
    """A sound adapter, every weight finite, that overflows float32 in the first layer."""
    folder, source = tmp_path_factory.mktemp("overflowing"), world.adapters["plain"].path
    weights = load_file(source / "adapter_model.safetensors")
    huge = {name: tensor * 1e25 for name, tensor in weights.items()}
    save_file(huge, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return {"adapter": content_digest(folder), "adapter_path": str(folder)}


def test_an_overflowing_adapter_fails_its_own_requests_only(engine, world, submit, overflowing):
    bad = [structs.replace(submit(f"huge-{n}", PROMPT), **overflowing) for n in range(2)]
    good = [submit(f"beside-{n}", PROMPT, adapter) for n, adapter in enumerate(("", "large"))]
    *failed, base, large = engine.run(*bad, *good)
    for answer in failed:
        assert (answer.error.code, answer.tokens) == ("FAILED_PRECONDITION", {})
        assert answer.error.reason == "NON_FINITE_OUTPUT"
    assert base.tokens[0] == world.greedy(PROMPT, 8)
    assert large.tokens[0] == world.greedy(PROMPT, 8, "large")


def test_blocks_that_held_what_is_not_finite_serve_the_next_as_well(
    engine, world, submit, overflowing
):
    """First the poison takes every block that can be had, then the next requests do."""
    longest = tuple(n % 128 for n in range(200))
    poison = [structs.replace(submit(f"poison-{n}", longest), **overflowing) for n in range(3)]
    assert all(answer.error for answer in engine.run(*poison))
    for n, answer in enumerate(engine.run(*(submit(f"after-{n}", PROMPT) for n in range(8)))):
        assert answer.tokens == {0: world.greedy(PROMPT, 8)}, n


def test_signals_are_left_to_the_parent(engine, submit):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(engine.pid, number)
    (answer,) = engine.run(submit("after-signals", PROMPT))
    assert answer.finish == {0: "length"}


def test_an_engine_on_the_cpu_leaves_a_gpu_alone(
    engine_in_thread, engine_config, world, submit, monkeypatch
) -> None:
    """Others may have it for themselves."""

    def start() -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", start)
    prompt = (5, 6, 7)
    with engine_in_thread(engine_config) as engine:
        [answer] = engine.run(submit("a", prompt, "plain"))
    assert answer.error is None
    assert answer.tokens[0] == world.greedy(prompt, 8, "plain")
