"""Times a whole step of the engine's runner on the CPU: base, one adapter, all distinct, and all
but one distinct, a mix of its own in every step; in turns.

python bench/bench_step.py --model FOLDER [--batch 16] [--rounds 30] [--json out.json]

FOLDER is what bench/peers/model.py makes. There is no front end and no gRPC here, other than in
bench/peers/compare.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, repeat
from pathlib import Path

import torch

from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import load_base
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.replay.recorded_steps import STEPS_BEFORE, RecordedSteps
from deltamux.engine.sequence import Scheduled
from deltamux.engine.sequence import Sequence as Request
from deltamux.engine.step.runner import ModelRunner
from deltamux.wire.messages import Sampling
from deltamux_kernels import native

# Of each row's adapter.
Slots = Sequence[int | None]

BLOCK = 16
PROMPT = 128
ARENA_BYTES = 1 << 30


class Steps:
    """One base, as many adapters as rows, and sequences whose context stays as long as it is."""

    def __init__(self, folder: Path, batch: int, device: str = "cpu") -> None:
        self.base = base = load_base(str(folder / "base"), device)
        rows = Rows(base.device)
        self.sites = DeviceSites(
            base.model, base.structure, rows, batch, ARENA_BYTES, base.dtype, base.device
        )
        self._load_adapters(sorted((folder / "adapters").iterdir())[:batch])
        self.blocks = -(-(PROMPT + 1) // BLOCK)
        cache = KVCache(base.layers, batch * self.blocks + 1, BLOCK, base.dtype, base.device)
        self.runner = ModelRunner(base, cache, rows)
        if device == "cpu" and native.available():
            self.runner.use(RecordedSteps(self.runner.logits, self.sites))
        self._requests = [_request(index, self.blocks) for index in range(batch)]

    def _load_adapters(self, folders: Sequence[Path]) -> None:
        for slot, path in enumerate(folders):
            adapter = parse_adapter(path, path.name, self.base.structure, self.base.dtype)
            assert self.sites.reserve(slot, adapter)
            self.sites.write(slot, adapter)

    def prefill(self, slots: Slots, chunk: int) -> None:
        """All prompts from the start, in steps of as many as make `chunk` tokens."""
        together = chunk // PROMPT
        for first in range(0, len(slots), together):
            step = list(zip(self._requests, slots, strict=True))[first : first + together]
            for request, slot in step:
                request.slot, request.num_computed = slot, 0
                del request.tokens[PROMPT:]
            self.runner.run([Scheduled(request, PROMPT) for request, _ in step])
        for request in self._requests:
            request.num_computed = PROMPT
            request.tokens.append(1)

    def decode(self, slots: Slots) -> None:
        """One token of the first sequences, always the same one."""
        self.runner.run(self.decoding(slots))

    def decoding(self, slots: Slots) -> list[Scheduled]:
        for request, slot in zip(self._requests, slots, strict=False):
            request.slot = slot
        return [Scheduled(request, 1) for request in self._requests[: len(slots)]]


def _request(index: int, blocks: int) -> Request:
    prompt = [3 + (31 * index + 7 * place) % 500 for place in range(PROMPT)]
    own = list(range(index * blocks + 1, (index + 1) * blocks + 1))
    return trial_sequence(index, prompt, own, Sampling(temperature=0.0))


def measure(steps: Steps, batch: int, rounds: int, chunk: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a decode step and of all prompts, by mode."""
    distinct = list(range(batch))
    modes: dict[str, Iterator[Slots]] = {
        "base": repeat([None] * batch),
        "one": repeat([min(3, batch - 1)] * batch),
        "distinct": repeat(distinct),
        "changing": cycle([*distinct[:n], distinct[n - 1], *distinct[n + 1 :]] for n in distinct),
    }
    times: dict[str, dict[str, list[float]]] = {mode: {} for mode in modes}
    for slots in modes.values():
        steps.prefill(next(slots), chunk)
        for _ in range(STEPS_BEFORE + 1):
            steps.decode(next(slots))
    for mode, work, repeats in _turns(modes, rounds):
        for _ in range(repeats):
            slots = next(modes[mode])
            start = time.perf_counter()
            if work == "decode":
                steps.decode(slots)
            else:
                steps.prefill(slots, chunk)
            times[mode].setdefault(work, []).append(time.perf_counter() - start)
    return {
        mode: {work: 1e3 * statistics.median(found) for work, found in of_mode.items()}
        for mode, of_mode in times.items()
    }


def _turns(modes: Iterable[str], rounds: int) -> Iterator[tuple[str, str, int]]:
    for number in range(rounds):
        for mode in modes:
            if number % 10 == 0:
                yield mode, "prefill", 1
            yield mode, "decode", 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prefill step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    steps = Steps(given.model, given.batch)
    found = measure(steps, given.batch, given.rounds, given.chunk)
    base = found["base"]
    for mode, of_mode in found.items():
        parts = [f"{work} {ms:8.2f} ms ({ms / base[work]:.3f})" for work, ms in of_mode.items()]
        print(f"{mode:10}", "   ".join(parts))
    if given.json:
        given.json.write_text(json.dumps({"batch": given.batch, "ms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
