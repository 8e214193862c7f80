"""Generates with the demo and all its adapters on a GPU, and compares with the CPU's tokens.

    python bench/gpu_smoke.py

One server with CUDA graphs, one without, float32 throughout, every adapter that generates and the
base in one batch, greedy. Exit code 0 when every answer has the CPU's tokens on both.
`--device cpu` compares the CPU with itself.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile

from deltamux.client import Answer, AsyncClient, generate_request
from deltamux.demo.server import Server
from deltamux.demo.tasks import TASKS, prompt, unseen_inputs, weights_path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=3, help="for each adapter")
    arguments = parser.parse_args()
    asked = [
        (task.name, text)
        for task in TASKS
        if not task.labels
        for text in unseen_inputs(task, arguments.prompts)
    ]
    asked += [("", text) for _, text in asked[: arguments.prompts]]
    expected = answers_on("cpu", asked)
    different = 0
    for how in ("--no-enforce-eager", "--enforce-eager"):
        answers = answers_on(arguments.device, asked, how)
        for (name, text), one, other in zip(asked, expected, answers, strict=True):
            if one.token_ids != other.token_ids:
                different += 1
                on_cpu = f"on the CPU {one.text!r}"
                print(f"{how}: {name or 'the base'}: {text!r}: {other.text!r}, {on_cpu}")
    same = 2 * len(asked) - different
    print(f"{same} of {2 * len(asked)} answers on {arguments.device} are the CPU's, by token")
    return 1 if different else 0


def answers_on(device: str, asked: list[tuple[str, str]], *flags: str) -> list[Answer]:
    """`asked`: adapter's name and text; all at once. `flags` of the server."""
    weights = weights_path()
    with (
        tempfile.TemporaryDirectory() as cache,
        Server(
            *("--model", str(weights / "base"), "--adapter-dir", str(weights / "adapters")),
            *("--device", device, "--dtype", "float32", "--adapter-cache-dir", cache, *flags),
        ) as server,
    ):
        return asyncio.run(_ask(server.target, asked))


async def _ask(target: str, asked: list[tuple[str, str]]) -> list[Answer]:
    async with AsyncClient(target) as client:
        requests = [generate_request(prompt(text), adapter=name) for name, text in asked]
        return await asyncio.gather(*(client.generate(request) for request in requests))


if __name__ == "__main__":
    sys.exit(main())
