"""Times what the front end delivers when the engine is not the limit.

python bench/bench_frontend.py [--streams 32 128] [--tokens 3000 6000] [--json out.json]

The front end is `deltamux serve`, its clients are those of gRPC in this process, and the engine
at the other end of the socket is `repeat`: one token for each stream, step after step, so many
steps a second that `--tokens` a second are offered, however much of them is delivered.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import select
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from deltamux.cli import main as deltamux
from deltamux.client import generate_request
from deltamux.demo.server import Server
from deltamux.launch import engine_process
from deltamux.v1 import inference_pb2_grpc
from deltamux.wire.channel import EngineEnd
from deltamux.wire.messages import FirstToken, Progress, Ready, Stats, StepDone, Submit

VOCABULARY = 4096
CONTEXT = 1 << 16
# The tokens that every stream repeats, any but the special ones.
FIRST_TOKEN, LAST_TOKEN = 300, 4000
STATS = Stats(1, 0, 1, 100, 0, 0, 0, 1, 1, 0.001, 0, 0, 0, 0, 0)
TICKS = os.sysconf("SC_CLK_TCK")


class FrontEnd(Server):
    """The real one; only what it starts as its engine is this file."""

    program: ClassVar[tuple[str, ...]] = (sys.executable, __file__)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def repeat(address: str) -> None:
    """An engine that computes nothing. A prompt says how many of its kind make up a batch, and how
    many milliseconds a step takes; all of a batch begin together and get `max_tokens` each."""
    link = EngineEnd(address)
    link.send(Ready("", "cpu", "", "", VOCABULARY, CONTEXT, CONTEXT, 16, 1, families=()))
    sys.stdin.readline()
    link.wake_on(sys.stdin.fileno())
    batch: list[Submit] = []
    # What stands on standard input behind the configuration is its end.
    while not select.select([sys.stdin], [], [], 0)[0]:
        link.wait(None)
        batch += [message for message in link.receive() if isinstance(message, Submit)]
        if batch and len(batch) == batch[0].prompt[0]:
            play(batch, link)
            batch = []


def play(batch: list[Submit], link: EngineEnd) -> None:
    """When the first step was due is told as the time in the queue."""
    gc.disable()
    start, seconds = time.perf_counter(), batch[0].prompt[1] / 1000
    last = batch[0].stopping.max_tokens - 1
    for step in range(last + 1):
        time.sleep(max(0.0, start + step * seconds - time.perf_counter()))
        token = FIRST_TOKEN + step % (LAST_TOKEN - FIRST_TOKEN)
        finish = "length" if step == last else ""
        first = None if step else FirstToken(start, 0.0, "")
        progress = (Progress(s.request_id, 0, (token,), (), finish, first) for s in batch)
        link.send(StepDone(tuple(progress), STATS))


@dataclass
class Stream:
    """What one client saw."""

    # Tokens and arrival of each message.
    messages: list[tuple[int, float]]
    start: float = 0.0

    def delays(self, step: float) -> list[float]:
        """Of each token, from when its step was due, on this machine's one clock."""
        arrivals = [arrival for tokens, arrival in self.messages for _ in range(tokens)]
        return [arrival - self.start - step * i for i, arrival in enumerate(arrivals)]


async def read(stub: Any, request: Any, begun: asyncio.Event) -> Stream:
    stream = Stream([])
    async for response in stub.Generate(request):
        begun.set()
        stream.messages.append((len(response.token_ids), time.perf_counter()))
        if response.HasField("timing"):
            stream.start = response.timing.queue
    return stream


async def measure(server: FrontEnd, streams: int, tokens: int, seconds: float) -> dict[str, float]:
    step = round(1000 * streams / tokens)
    steps = round(1000 * seconds / step)
    request = generate_request([streams, step], max_tokens=steps, ignore_eos=True)
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub, begun = inference_pb2_grpc.InferenceServiceStub(channel), asyncio.Event()
        readers = [asyncio.create_task(read(stub, request, begun)) for _ in range(streams)]
        await begun.wait()
        cpu, own_cpu = server.cpu_seconds(), time.process_time()
        seen = await asyncio.gather(*readers)
        cpu, own_cpu = server.cpu_seconds() - cpu, time.process_time() - own_cpu
    took = max(stream.messages[-1][1] for stream in seen) - seen[0].start
    messages = sum(len(stream.messages) for stream in seen)
    delays = [delay for stream in seen for delay in stream.delays(step / 1000)]
    assert len(delays) == streams * steps, "every token arrives"
    cuts = statistics.quantiles(delays, n=100)
    return {
        "streams": streams,
        "offered_tokens_per_s": 1000 * streams / step,
        "tokens_per_s": len(delays) / took,
        "messages_per_s": messages / took,
        "tokens_per_message": len(delays) / messages,
        "cpu_s_per_1000_tokens": 1000 * cpu / len(delays),
        "cpu_s_per_1000_messages": 1000 * cpu / messages,
        "cpu_share": cpu / took,
        "client_cpu_share": own_cpu / took,
        "delay_p50_ms": 1000 * cuts[49],
        "delay_p99_ms": 1000 * cuts[98],
    }


def make_model(folder: Path) -> None:
    """As much of a model as the front end reads: a tokenizer of bytes and pairs of them."""
    LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    pages = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    tokenizer.train([str(page) for page in pages], trainer)
    assert tokenizer.get_vocab_size() > LAST_TOKEN
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        engine_process.PROGRAM = FrontEnd.program
        return deltamux()
    if sys.argv[1:2] == ["--socket"]:
        repeat(sys.argv[2])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 128, 256, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[3000, 12000, 24000])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    # Only the front end may stop to look for garbage.
    gc.disable()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        with FrontEnd("--model", folder, "--adapter-cache-dir", f"{folder}/cache") as server:
            for streams, tokens in product(args.streams, args.tokens):
                found = asyncio.run(measure(server, streams, tokens, args.seconds))
                print("  ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
                results.append(found)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
