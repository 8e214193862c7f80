"""Which sequences take part in a step, with how many tokens, and who gives way."""


def test_whole_prompts_wait_for_a_step_that_holds_them(setup, new_sequence):
    engine = setup(budget=16, generates=False)
    prompts = [new_sequence(num_prompt=n, max_tokens=1) for n in (6, 12, 3, 16)]
    engine.add(*prompts)
    first, second, third, fourth = prompts
    assert engine.step() == {first: 6}
    assert engine.step() == {second: 12, third: 3}
    assert engine.step() == {fourth: 16}
    assert engine.is_empty()


def test_prefill_is_chunked_under_the_budget_and_decodes_come_first(setup, new_sequence):
    engine = setup(budget=16)
    long, short = new_sequence(num_prompt=30), new_sequence(num_prompt=3)
    engine.add(long)
    assert engine.step() == {long: 16}
    engine.add(short)
    assert engine.step() == {long: 14, short: 2}
    assert engine.step() == {long: 1, short: 1}
    assert engine.step() == {long: 1, short: 1}

    late = new_sequence(num_prompt=40, priority=1)
    engine.add(late)
    plan = engine.step()
    assert plan == {long: 1, short: 1, late: 14}
    assert list(plan) == [long, short, late]


def test_no_more_sequences_run_than_allowed(setup, new_sequence):
    engine = setup(seqs=3)
    sequences = [new_sequence() for _ in range(5)]
    engine.add(*sequences)
    engine.step()
    assert engine.scheduler.running == sequences[:3]
    engine.steps_until(engine.is_empty)


def test_more_sequences_than_budget_all_have_their_token_in_every_step(setup, new_sequence):
    engine = setup(seqs=8, budget=2)
    sequences = [new_sequence(num_prompt=1) for _ in range(4)]
    engine.add(*sequences)
    assert engine.step() == {sequences[0]: 1, sequences[1]: 1}
    engine.steps_until(engine.is_empty)


def test_larger_priority_runs_first_then_earlier_arrival(setup, new_sequence):
    engine = setup(seqs=1)
    first, second, urgent = new_sequence(), new_sequence(), new_sequence(priority=5)
    engine.add(second, first, urgent)
    assert engine.scheduler.waiting == [urgent, first, second]


def test_the_youngest_is_preempted_and_computed_again(setup, new_sequence):
    engine = setup(num_blocks=6)
    old = new_sequence(num_prompt=8, max_tokens=16, adapter="a")
    young = new_sequence(num_prompt=8, max_tokens=16, adapter="b")
    engine.add(old, young)
    engine.steps_until(lambda: engine.scheduler.num_preemptions)
    assert old in engine.scheduler.running
    assert engine.scheduler.waiting == [young]
    assert not young.blocks and young.num_computed == 0 and young.slot is None
    assert engine.adapters.leases == {"a": 1, "b": 0}
    generated = young.num_generated
    assert generated > 0

    engine.steps_until(lambda: young.blocks)
    assert young.num_computed > 1
    assert young.num_generated >= generated
    engine.steps_until(engine.is_empty)
    assert old.num_generated == young.num_generated == 16


def test_priority_outranks_age_when_blocks_run_out(setup, new_sequence):
    engine = setup(num_blocks=6)
    old = new_sequence(num_prompt=8, max_tokens=16)
    urgent = new_sequence(num_prompt=8, max_tokens=16, priority=1)
    engine.add(old, urgent)
    engine.steps_until(lambda: engine.scheduler.num_preemptions)
    assert engine.scheduler.waiting == [old]


def test_a_newcomer_waits_until_it_would_not_be_preempted_at_once(setup, new_sequence):
    engine = setup(num_blocks=5)
    old, young = new_sequence(num_prompt=8, max_tokens=8), new_sequence(num_prompt=12)
    engine.add(old)
    engine.step()
    engine.add(young)
    engine.steps_until(engine.is_empty)
    assert engine.scheduler.num_preemptions == 0


def test_cancel_frees_whatever_state_a_choice_is_in(setup, new_sequence):
    engine = setup(budget=8)
    decoding = new_sequence(num_prompt=2, max_tokens=50, adapter="a")
    prefilling = new_sequence(num_prompt=40, adapter="b")
    waiting = new_sequence(adapter="c")
    engine.add(decoding, prefilling, waiting)
    engine.step()
    engine.step()
    assert [s.num_uncomputed > 1 for s in engine.scheduler.running] == [False, True]
    for sequence in (decoding, prefilling, waiting):
        engine.scheduler.cancel(sequence.request_id)
    engine.scheduler.cancel("unknown")
    assert engine.is_empty()


def test_cancel_of_some_choices_leaves_the_others(setup, new_sequence):
    engine = setup()
    leader = new_sequence()
    followers = [new_sequence(leader=leader) for _ in range(2)]
    engine.add(leader, *followers)
    engine.step()
    engine.scheduler.cancel(leader.request_id, (leader.index, followers[1].index))
    assert engine.scheduler.running == [followers[0]]


def test_deadlines(setup, new_sequence):
    engine = setup(seqs=1)
    running, waiting = new_sequence(deadline=5.0), new_sequence(deadline=3.0)
    engine.add(running, waiting, new_sequence())
    engine.step()
    assert engine.scheduler.next_deadline() == 3.0
    assert engine.scheduler.expired(2.9) == set()
    assert engine.scheduler.expired(3.0) == {waiting.request_id}
    assert engine.scheduler.expired(6.0) == {running.request_id, waiting.request_id}
