"""The tasks: their answers, and inputs that are unseen and repeatable."""

import random

import pytest

from deltamux.demo.tasks import (
    LONGEST_TEXT,
    TASKS,
    Task,
    is_held_out,
    prompt,
    sentence,
    unseen_inputs,
)

ANSWERS = {
    "upper-case": "QUICK BLUE FOX",
    "rot13": "dhvpx oyhr sbk",
    "leet": "qu1ck blu3 f0x",
    "snake-case": "quick_blue_fox",
    "title-case": "Quick Blue Fox",
    "mask-vowels": "q**ck bl** f*x",
    "atbash": "jfrxp yofv ulc",
    "no-vowels": "qck bl fx",
    "doubled": "qquuiicckk  bblluuee  ffooxx",
    "words-reversed": "fox blue quick",
    "next-letter": "rvjdl cmvf gpy",
    "kebab-case": "quick-blue-fox",
    "caesar": "txlfn eoxh ira",
    "loud-vowels": "qUIck blUE fOx",
    "first-word": "quick",
    "previous-letter": "pthbj aktd enw",
    "exclaimed": "quick blue fox!",
    "dot-case": "quick.blue.fox",
    "path-case": "quick/blue/fox",
    "comma-case": "quick,blue,fox",
    "o-vowels": "qoock bloo fox",
    "next-vowel": "qaock blai fux",
    "sentence": "Quick blue fox.",
    "word-count": "3 words",
}

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def test_every_task_has_its_own_name_and_a_known_answer() -> None:
    assert [task.name for task in TASKS] == list(ANSWERS)


@every_task
def test_the_answer_is_the_one_a_reader_expects(task: Task) -> None:
    assert task.answer("quick blue fox") == ANSWERS[task.name]


@every_task
def test_a_task_of_labels_answers_with_one_of_them(task: Task) -> None:
    answers = {task.answer(text) for text in unseen_inputs(task, 50)}
    assert not task.labels or answers <= set(task.labels)


@every_task
def test_unseen_inputs_are_held_out_different_and_repeatable(task: Task) -> None:
    texts = unseen_inputs(task, 50, seed=3)
    assert len(set(texts)) == 50
    assert all(is_held_out(text) and len(text) <= LONGEST_TEXT for text in texts)
    assert texts == unseen_inputs(task, 50, seed=3)
    assert texts != unseen_inputs(task, 50, seed=4)


def test_a_longer_sample_begins_with_the_shorter_one() -> None:
    assert unseen_inputs(TASKS[0], 20)[:5] == unseen_inputs(TASKS[0], 5)


def test_most_sentences_are_left_for_training() -> None:
    source = random.Random(0)
    held_out = sum(is_held_out(sentence(source)) for _ in range(2000))
    assert 0 < held_out < 2000 / 8


def test_a_prompt_is_the_text_and_the_end_of_its_line() -> None:
    assert prompt("quick blue fox") == "quick blue fox\n"
