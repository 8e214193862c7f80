"""`deltamux generate`: one prompt to a server, its answer as it comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic_settings import CliPositionalArg

from deltamux.cli.command import Command, UsageError, option
from deltamux.client import DEFAULT_TARGET, Client, ClientError, generate_request
from deltamux.v1 import inference_pb2


class Generate(Command):
    """Send a prompt to a server and print its answer as it is generated. What no option says is as
    the model's generation config has it, and the answer may fill the context."""

    prompt: CliPositionalArg[str] = option(help="the text; - reads it from standard input")
    target: str = option(DEFAULT_TARGET, help="the server", metavar="HOST:PORT")
    adapter: str = option(
        "", help='"name" or "name@version"; the base when absent', metavar="ADAPTER"
    )
    chat: bool = option(False, help="as a user's message, under the model's chat template")
    max_tokens: int | None = option(None, ge=1, help="longest answer", metavar="TOKENS")
    temperature: float | None = option(None, ge=0, help="0 is greedy", metavar="T")
    top_p: float | None = option(None, gt=0, le=1, help="nucleus sampling", metavar="P")
    top_k: int | None = option(None, ge=0, help="0: no limit", metavar="K")
    seed: int | None = option(None, ge=0, help="repeats the same answer", metavar="N")
    stop: list[str] = option(
        default_factory=list, help="a text that ends the answer; repeatable", metavar="TEXT"
    )
    timeout: float | None = option(
        None, gt=0, help="longest wait for the answer", metavar="SECONDS"
    )


def main(arguments: Sequence[str]) -> int:
    options = Generate.parse("deltamux generate", arguments)
    try:
        request = _request(options)
    except ValueError as error:
        # A number that no field of the contract can hold, or a text that is not UTF-8.
        raise UsageError(f"deltamux generate: {error}") from None
    try:
        with Client(options.target, options.timeout) as client:
            for response in client.stream(request):
                print(response.text, end="", flush=True)
            print()
    except ClientError as error:
        print(f"deltamux generate: {error.code}: {error.message}", file=sys.stderr)
        return 1
    return 0


def _request(options: Generate) -> inference_pb2.GenerateRequest:
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    return generate_request(
        [{"role": "user", "content": text}] if options.chat else text,
        adapter=options.adapter,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stop=options.stop,
    )
