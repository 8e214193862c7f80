"""The demo's show: ask one server through all its adapters at once, and check every answer."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from prometheus_client import Metric
from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from deltamux.client import (
    AsyncClient,
    Client,
    ClientError,
    classify_request,
    generate_request,
)
from deltamux.demo.server import Server, ServerFailed
from deltamux.demo.tasks import TASKS, Task, prompt, unseen_inputs, weights_path
from deltamux.v1 import adapters_pb2

BASE = Task("", "repeats its input", lambda text: text)


@dataclass(frozen=True)
class Question:
    """A text that no weight was trained on, for one adapter."""

    task: Task
    text: str

    @property
    def expected(self) -> str:
        return self.task.answer(self.text)


@dataclass(frozen=True)
class Reply:
    """What the server answered: a text, or the likeliest label of a task head."""

    text: str
    tokens: int = 0


def run(prompts: int, seed: int) -> int:
    """Shows `prompts` questions for each adapter and the base; 0 when all answers are right."""
    console = Console()
    questions = [
        Question(task, text)
        for task in (BASE, *TASKS)
        for text in unseen_inputs(task, prompts, seed)
    ]
    console.print(f"Starting a server with one frozen model and {len(TASKS)} adapters ...")
    arguments = (*_serve_arguments(), "--device", "cpu")
    try:
        with (
            TemporaryDirectory() as cache,
            Server(*arguments, "--adapter-cache-dir", cache) as server,
        ):
            return _show(console, server, questions)
    except (ServerFailed, ClientError) as error:
        console.print(f"[red]The demo failed:[/] {escape(str(error))}", highlight=False)
        return 1


def _serve_arguments() -> tuple[str, ...]:
    weights = weights_path()
    return ("--model", str(weights / "base"), "--adapter-dir", str(weights / "adapters"))


def _show(console: Console, server: Server, questions: Sequence[Question]) -> int:
    started = time.perf_counter()
    replies = asyncio.run(_ask_all(server.target, questions))
    seconds = time.perf_counter() - started
    with Client(server.target) as client:
        adapters = {adapter.name: adapter for adapter in client.list_adapters()}
    console.print("\nOne frozen model, one batch, every row through its own adapter:\n")
    console.print(_answers_table(questions, replies, adapters))
    right = sum(r.text == q.expected for q, r in zip(questions, replies, strict=True))
    tokens = sum(reply.tokens for reply in replies)
    console.print(
        f"\n{right} of {len(questions)} answers right; {len(questions)} concurrent requests, "
        f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s)\n"
    )
    console.print("How many adapters shared a step, from /metrics:\n")
    console.print(_steps_table(server.metrics()["deltamux_adapters_per_step"]))
    console.print(_what_next(), highlight=False, markup=False, soft_wrap=True)
    return 0 if right == len(questions) else 1


async def _ask_all(target: str, questions: Sequence[Question]) -> list[Reply]:
    async with AsyncClient(target) as client:
        return await asyncio.gather(*(_ask(client, question) for question in questions))


async def _ask(client: AsyncClient, question: Question) -> Reply:
    task, text = question.task, prompt(question.text)
    if task.labels:
        (scores,) = await client.classify(classify_request(text, adapter=task.name))
        return Reply(max(scores, key=lambda score: score.score).label)
    answer = await client.generate(generate_request(text, adapter=task.name))
    return Reply(answer.text, answer.completion_tokens)


def _answers_table(
    questions: Sequence[Question],
    replies: Sequence[Reply],
    adapters: dict[str, adapters_pb2.Adapter],
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("prompt", "adapter", "family", "rank", "size", "answer", ""):
        justify: JustifyMethod = "right" if heading in ("rank", "size") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for question, reply in zip(questions, replies, strict=True):
        adapter = adapters.get(question.task.name, adapters_pb2.Adapter(name="(base)"))
        right = reply.text == question.expected
        table.add_row(
            question.text,
            adapter.name,
            adapter.family,
            str(adapter.rank or ""),
            f"{adapter.device_bytes / 1000:.0f} kB" if adapter.device_bytes else "",
            escape(reply.text),
            "[green]right[/]" if right else f"[red]wrong[/], not {question.expected}",
        )
    return table


def _steps_table(histogram: Metric) -> Table:
    """From deltamux_adapters_per_step of the server's own /metrics."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("adapters", justify="right")
    table.add_column("steps", justify="right")
    below = 0
    for sample in histogram.samples:
        if sample.name.endswith("_bucket"):
            steps = int(sample.value) - below
            below = int(sample.value)
            if steps:
                table.add_row(sample.labels["le"].removesuffix(".0"), str(steps))
    return table


def _what_next() -> str:
    program = _program()
    return f"""
To talk to such a server yourself, start one:

  {program} serve {shlex.join(_serve_arguments())}

and ask it from another terminal,

  {program} generate $'good morning\\n' --adapter {TASKS[0].name}

with grpcurl,

  grpcurl -plaintext -d '{{"text": "good morning\\n", "adapter": "{TASKS[0].name}"}}' \\
      localhost:8000 deltamux.v1.InferenceService/Generate

or from Python ({sys.executable}):

  from deltamux.client import Client, generate_request
  with Client("localhost:8000") as client:
      print(client.generate(generate_request("good morning\\n", adapter="{TASKS[0].name}")).text)
"""


def _program() -> str:
    """How a shell calls deltamux: by its name, or in an environment that is not active."""
    if shutil.which("deltamux"):
        return "deltamux"
    return shlex.join((sys.executable, "-m", "deltamux"))
