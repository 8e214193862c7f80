"""Files of many adapters are read at once by the first threads that read any."""

from __future__ import annotations

import subprocess
import sys

import pytest

READERS = {
    "header": """header._tensor("a", {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})""",
    "tokenizer_file": """tokenizer_file.parse_tokenizer(
        '{"added_tokens": [{"id": 1, "content": "a"}], "model": {"vocab": {}}}').words()""",
}
# A type is new to msgspec whenever its module is.
SCRIPT = """
import importlib, sys, threading
from deltamux.adapters.checkpoint import {module}

sys.setswitchinterval(1e-7)
for _ in range(200):
    importlib.reload({module})
    start, read = threading.Barrier(8), []
    def go():
        start.wait()
        read.append({call})
    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 8 and len(set(map(repr, read))) == 1
"""


@pytest.mark.parametrize("module", READERS)
def test_the_first_threads_read_as_later_ones_do(module: str) -> None:
    script = SCRIPT.format(module=module, call=READERS[module])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
