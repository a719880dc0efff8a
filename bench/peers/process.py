"""The other side of a reader's process: orders go in, answers come out, or the reason for none."""

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.peers.places import Place

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600  # for one order: the slowest builds for half a minute here


class Failed(Exception):
    """Why a reader gave no answer, in one line."""


class ReaderProcess:
    """A reader with a number of workers. Closing it ends it and every process that it started."""

    def __init__(self, place: Place, path: Path, n_workers: int, log: Path) -> None:
        command = [str(place.python), "-m", "bench.peers.reading", place.module, str(path)]
        command += [str(place.store), str(n_workers)]
        self.log = log
        # Hubs are not asked whether there is something newer.
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO), "TOKENIZERS_PARALLELISM": "false"}
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **quiet},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def ask(self, *order: Any) -> Any:
        """Give an order and wait for its answer. Raises Failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # then why is read below
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        if not ready:
            raise Failed(f"no answer in {TIMEOUT_S} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"ended with status {self.process.wait()}: {self.last_words()}")
        how, answer = json.loads(line)
        if how == "failed":
            raise Failed(" ".join(str(answer).split()))
        return answer

    def last_words(self) -> str:
        """The last line of what it printed."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def close(self) -> None:
        """By its process group: workers of others outlive their parent."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> "ReaderProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
