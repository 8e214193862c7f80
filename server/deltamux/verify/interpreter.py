"""Another Python, for a library that cannot be installed beside deltamux."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from deltamux.verify import alone
from deltamux.verify.alone import Answer, Question, Refused


@dataclass(frozen=True)
class Interpreter:
    """A path or name of a Python, and the seconds that an answer of it may take."""

    python: str
    timeout: float

    def ask(self, question: Question) -> Answer:
        """Raises Refused, also for a Python that does not run or comes to no answer."""
        with TemporaryDirectory(prefix="deltamux-") as name:
            folder = Path(name)
            question.write(folder)
            log = folder / "log"
            code = self._run(folder, log)
            if code:
                raise Refused(f"{self.python} gave no answer: {_how_it_ended(code, log)}")
            try:
                return Answer.read(folder)
            except FileNotFoundError:
                raise Refused(f"{self.python} gave no answer; is it a Python?") from None

    def _run(self, folder: Path, log: Path) -> int:
        # Isolated: what is set for this Python, PYTHONPATH for one, is not meant for that one.
        command = [self.python, "-I", alone.__file__, str(folder)]
        with open(log, "wb") as file:
            try:
                # In a session of its own, so that all that it starts can be ended with it.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            except OSError as error:
                raise Refused(f"{self.python} cannot be run: {error.strerror}") from None
        try:
            return process.wait(self.timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise Refused(
                f"{self.python} gave no answer within {self.timeout:g} seconds; "
                "--reference-timeout gives it more"
            ) from None


def _how_it_ended(code: int, log: Path) -> str:
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    # Of a traceback, the last line says what was wrong.
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"it ended with exit code {code}"
