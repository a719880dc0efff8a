"""A Dask cluster of real processes: a scheduler and workers that can be killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from helpers.commands import REPO

START_S = 60


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def children_of(pid: int) -> list[int]:
    """Of every thread of a process."""
    found: list[int] = []
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return found


class DaskProcesses:
    """`dask scheduler` and `dask worker` as one types them; their words go to files in `folder`."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.env = {**os.environ, **env}
        self.port = free_port()
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self.n_started = 0

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start_scheduler(self) -> None:
        words = ["scheduler", "--host", "127.0.0.1", "--port", self.port, "--no-dashboard"]
        self.scheduler = self._start("scheduler", words, {})
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise TimeoutError("no scheduler came up")

    def start_worker(
        self, *more: object, checkout: Path = REPO, is_watched: bool = True
    ) -> subprocess.Popen[bytes]:
        """is_watched: by a nanny, which starts it again where it was killed."""
        words = ["worker", self.address, "--nthreads", 1, "--no-dashboard", *more]
        words += ["--local-directory", self.folder / "local"]
        words += [] if is_watched else ["--no-nanny"]
        worker = self._start("worker", words, {"PYTHONPATH": str(checkout)})
        self.workers.append(worker)
        return worker

    def _start(
        self, what: str, words: list[object], env: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        self.n_started += 1
        with open(self.folder / f"{what}-{self.n_started}.log", "wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *map(str, words)],
                cwd=self.folder,
                env={**self.env, "PYTHONPATH": str(REPO), **env},
                stdout=said,
                stderr=said,
            )

    def working(self) -> list[int]:
        """The processes that do tasks: those that nannies watch, or that are watched by none."""
        pids = []
        for worker in self.workers:
            if worker.poll() is None:
                watched = [pid for pid in children_of(worker.pid) if _does_tasks(pid)]
                pids += watched or [worker.pid]
        return pids

    def kill_one_that_works(self, number: int) -> None:
        pids = self.working()
        if pids:
            _kill(pids[number % len(pids)])

    def kill_scheduler(self) -> None:
        assert self.scheduler is not None
        self.scheduler.kill()
        self.scheduler.wait()

    def kill_workers(self) -> None:
        for pid in self.working():
            _kill(pid)
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.workers.clear()

    def kill_all(self) -> None:
        self.kill_workers()
        self.kill_scheduler()


def _does_tasks(pid: int) -> bool:
    with suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _kill(pid: int) -> None:
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def dask_processes(
    folder: Path, env: Mapping[str, str], n_workers: int = 2
) -> Iterator[DaskProcesses]:
    found = DaskProcesses(folder, env)
    try:
        found.start_scheduler()
        for _ in range(n_workers):
            found.start_worker()
        yield found
    finally:
        with suppress(AssertionError):
            found.kill_all()
