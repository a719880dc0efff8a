"""The shards of a plan made by the workers of a Dask cluster: out come receipts, as they are there.

    window of futures -> tasks on workers -> receipts -> the journal, which this process keeps alone

A task is one shard, or those that share what has to be decoded. It is idempotent: Dask may run it
twice, or again after a worker is gone. Futures are never kept: a window of them is in flight, and
each is dropped once its receipts are taken, so that a worker that dies takes nothing with it but
what it was making.

Only here Dask is imported, and only once it is needed.
"""

import logging
import os
import pickle
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from convert.environment import OtherVersions, environment_of
from convert.executors import Made
from convert.machine import memory_of, n_cores
from convert.plan import Plan
from convert.shard import is_train_of
from convert.shard_task import (
    CannotMake,
    Job,
    Receipts,
    Reopenable,
    ShardTask,
    Token,
    check_here,
    close_sources,
    make_shards,
    shards_together,
)
from convert.sources.base import RowFacts, RowReader, Source
from shards.errors import UserError, WrongSetting, WrongSource, how_to_install, one_line
from shards.files import LocalFolder, WritableFolder, log
from shards.manifest import Receipt
from shards.progress import Progress, n_rows_text

LOCAL = "local"
OWN = "dask"
REQUIREMENT = "dask[distributed]"
TASKS_A_THREAD = 4  # in flight: a worker never waits for the next one
RETRIES = 2  # of a task that raises
GIVE_UP_AFTER = 100  # failed shards: what fails so often will not end by itself
ANSWER_WITHIN_S = 30  # a scheduler, at first
# A terminal sends it to every process; ours ends the others.
IGNORE_CTRL_C = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
POLL_S = 0.005
LOOK_EVERY_S = 2.0  # at which workers are there
SAY_EVERY_S = 10.0  # that none is


class NotThere(UserError):
    """A scheduler that does not answer, or not any more."""


class ShardsFailed(UserError):
    """Shards that could not be made; all others are done. failed: by their numbers, why."""

    def __init__(self, failed: dict[int, str], n_shards: int, is_early: bool) -> None:
        number, why = next(iter(failed.items()))
        rest = ", the rest was not tried" if is_early else ""
        what = f"{len(failed)} of {n_shards} shards failed{rest}, the first: shard {number}: {why}"
        super().__init__(what, "What is done is kept")
        self.failed = failed


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Which workers make shards.

    scheduler: OWN, a cluster of processes of this machine that ends with the conversion; the
    address of a scheduler, tcp://HOST:PORT; or the path of its file. client: a client that is
    there, in its place; it is never closed. workers: processes of OWN; None: one a core. report:
    an .html about the tasks, from Dask's own dashboard.
    """

    scheduler: str = OWN
    client: Any = None
    workers: int | None = None
    report: Path | None = None

    def __str__(self) -> str:
        if self.client is not None:
            return str(self.client.scheduler.address if self.client.scheduler else self.client)
        return "this machine's own cluster" if self.scheduler == OWN else self.scheduler

    def check(self) -> None:
        """Raise UserError where Dask is not there, or what was given leads to no scheduler."""
        distributed = _distributed()
        if self.client is None:
            return
        if not isinstance(self.client, distributed.Client) or self.client.asynchronous:
            right = "expected a dask.distributed.Client, and no asynchronous one"
            raise WrongSetting("client", type(self.client).__name__, right)

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """A client, which is closed at the end with what was started for it. Raises NotThere."""
        distributed = _distributed()
        if self.client is not None:
            yield self.client
            return
        with ExitStack() as stack:
            stack.enter_context(_quiet_dask())
            if self.scheduler == OWN:
                where = {"address": stack.enter_context(_own_cluster(self.workers or n_cores()))}
            elif "://" in self.scheduler:
                where = {"address": self.scheduler}
            else:
                _check_scheduler_file(self.scheduler)
                where = {"scheduler_file": self.scheduler}
            try:
                client = distributed.Client(
                    **where, timeout=ANSWER_WITHIN_S, set_as_default=False, name="convert"
                )
            except (OSError, ValueError, TypeError, ImportError) as error:
                what = f"no Dask scheduler answers at {self.scheduler} ({one_line(error)})"
                raise NotThere(what, "Check that it runs, and its address") from None
            stack.callback(_close, client)
            yield client


def _distributed() -> Any:
    """Raises UserError where it is not installed."""
    try:
        import distributed
    except ImportError:
        what = "converting on a cluster needs Dask"
        raise UserError(what, how_to_install("cluster", REQUIREMENT)) from None
    return distributed


@contextmanager
def _quiet_dask() -> Iterator[None]:
    """Of what its own client logs, tracebacks mostly, a user is told one line by us.

    It goes on where the block ends badly: asyncio tells of futures that nobody asked as they are
    freed, which may be later.
    """
    names = ("asyncio", "tornado", "distributed", *_loggers_of_dask())
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL + 1)
    yield
    for each, level in zip(loggers, levels, strict=True):
        each.setLevel(level)


def _loggers_of_dask() -> list[str]:
    """Of what it is made of too; each has a level of its own."""
    known = logging.root.manager.loggerDict
    return [name for name in known if name.startswith(("distributed.", "tornado."))]


def _own_cluster(n_workers: int) -> AbstractContextManager[Any]:
    """Processes of one thread each on this machine, without a dashboard."""
    from distributed import LocalCluster

    return closing(
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            dashboard_address=":0",  # any free port
            silence_logs=logging.CRITICAL,  # what ends badly is said by us, in one line
            preload=[IGNORE_CTRL_C],
        )
    )


def _check_scheduler_file(path: str) -> None:
    """Dask would wait for it without a word."""
    if not Path(path).is_file():
        raise WrongSetting("scheduler", path, "there is no such file; a scheduler writes it")


def _close(client: Any) -> None:
    """Not waited for where the scheduler is gone."""
    with suppress(Exception):
        client.close(timeout=2)


# ----------------------------------------------------------------------------------- the workers


def _check_workers(client: Any, job: Job) -> None:
    """Raise for the first of those that are there already; later ones look by themselves."""
    answers = client.run(_look, job, on_error="return")
    for address, answer in answers.items():
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, BaseException):
            raise _not_ours(address, answer)


def _not_ours(where: str, error: BaseException) -> OtherVersions:
    """A worker that does not even know what it is asked."""
    there = f"that fails with {type(error).__name__} ({one_line(error)})"
    return OtherVersions(where, "an installation", there, "works")


def _look(job: Job, dask_worker: Any) -> UserError | None:
    """On a worker: what keeps it from making shards of this job."""
    try:
        check_here(job, dask_worker.address)
    except UserError as error:
        return error
    return None


Make = Callable[[Job, ShardTask, str], Receipts]


def _on_worker(make: Make, job: bytes, task: bytes) -> bytes:
    """`make` of a job and a task, pickled: its receipts, or an error that no other try would
    change. Dask tries again what is raised.

    Bytes: Dask would take objects and arrays apart, and its scheduler make them again.
    """
    from distributed import get_worker

    try:
        return pickle.dumps(make(_job_of(job), pickle.loads(task), get_worker().address))
    except (CannotMake, OtherVersions) as error:
        return pickle.dumps(error)


@lru_cache(1)
def _job_of(pickled: bytes) -> Job:
    job: Job = pickle.loads(pickled)
    return job


def _let_go_of_sources(client: Any) -> None:
    with suppress(Exception):
        client.run(close_sources, on_error="ignore")


@contextmanager
def _reported(client: Any, path: Path | None) -> Iterator[None]:
    """Raises WrongSetting where a report cannot be made. One that fails at the end is told."""
    if path is None:
        yield
        return
    from distributed import performance_report

    _check_bokeh(client)
    with ExitStack() as stack:
        stack.enter_context(client.as_current())
        stack.push(_telling(performance_report(filename=str(path))))
        yield


def _check_bokeh(client: Any) -> None:
    from importlib.metadata import version

    try:
        version("bokeh")
        client.run_on_scheduler(version, "bokeh")
    except Exception as error:
        right = "the package bokeh draws it, here and where the scheduler runs"
        raise WrongSetting("report", one_line(error), right) from None


def _telling(report: Any) -> Callable[..., None]:
    """Begin a report; what is called at its end."""
    report.__enter__()

    def end(*error: Any) -> None:
        try:
            report.__exit__(*error)
        except Exception as problem:
            log(f"the report could not be made ({one_line(problem)})")

    return end


# ------------------------------------------------------------------------------- one conversion


class ClusterExecutor:
    """Does the tasks of one plan, once, in a `with` block."""

    make: Make = staticmethod(make_shards)  # what a worker is asked to do
    scratch_bytes = 0  # on this machine

    def __init__(
        self,
        plan: Plan,
        source: Source,
        readers: Sequence[RowReader],
        folder: WritableFolder,
        cluster: Cluster,
    ) -> None:
        """readers: of all fields; closed. folder: of the set. Raises WrongSource where no other
        process can read it.
        """
        if not isinstance(source, Reopenable):
            what = "cannot be opened by other processes: it has no `opener`"
            raise WrongSource(source, what, "Convert it on this machine alone")
        self.peak_memory: int | None = None  # of this process alone
        self._plan = plan
        self._source = source
        self._group_rows = [reader.group_rows for reader in readers]
        self._has_scratch = any(reader.scratch_bytes for reader in readers)
        for reader in readers:
            reader.close()
        self._folder = folder
        self._cluster = cluster
        self._run = secrets.token_hex(4)
        self._job = Job(
            key=f"{plan.fingerprint}-{self._run}",
            opener=source.opener,
            plan=plan,
            folder=_folder_for_workers(folder),
            environment=environment_of(plan),
            token=_token(folder, self._run),
        )
        self._progress: Progress | None = None

    def __enter__(self) -> "ClusterExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()

    def run(self, todo: Sequence[int], facts: "Future[RowFacts]") -> Made:
        """Yields (shard, receipt) of these shards, which whoever calls puts into the journal.

        facts: waited for, as statistics need the splits. Raises ShardsFailed once all others are
        done, what a task raised where it is the only one, OtherVersions and CannotMake at once, and
        NotThere where the scheduler is gone.
        """
        if not todo:
            return
        tasks = self._tasks(todo, facts.result())
        n_rows = sum(self._plan.n_rows_of(k) for k in todo)
        with self._cluster.connected() as client, _token_there(self._job.token):
            _check_workers(client, self._job)
            self._progress = Progress("converting", n_rows, unit="row", amount=n_rows_text)
            with _reported(client, self._cluster.report):
                window = _Window(client, self._job, str(self._cluster), self.make)
                with closing(self._taken(window, tasks)) as receipts:
                    yield from receipts
            _let_go_of_sources(client)

    def _tasks(self, todo: Sequence[int], facts: RowFacts) -> Iterator[ShardTask]:
        together = shards_together(self._plan, self._group_rows, todo)
        if self._has_scratch or len(together) == 1 < len(todo):
            what = "has chunks that all its shards share: there is one task, and nothing to share"
            raise WrongSource(self._source, what, "Convert it on this machine alone")
        for shards in together:
            is_train = {k: is_train_of(facts, self._plan, k) for k in shards}
            yield ShardTask(shards=shards, is_train=is_train)

    def _taken(self, window: "_Window", tasks: Iterator[ShardTask]) -> Made:
        """Receipts of shards that lie where they should."""
        assert self._progress is not None
        failures = _Failures(len(self._plan.bounds))
        with closing(window.outcomes(tasks)) as outcomes:
            for shards, outcome in outcomes:
                if isinstance(outcome, BaseException):
                    failures.add(shards, outcome)
                    continue
                for k, receipt in outcome:
                    self._progress.add(self._plan.n_rows_of(k))
                    if problem := _what_is_not_there(self._folder, receipt):
                        failures.add((k,), CannotMake(problem))
                    else:
                        yield k, receipt
        self.peak_memory = memory_of([os.getpid()])
        failures.check()


def _folder_for_workers(folder: WritableFolder) -> str:
    """The address of a folder for a process that has another current one."""
    return str(folder.path.absolute()) if isinstance(folder, LocalFolder) else str(folder)


def _token(folder: WritableFolder, run: str) -> Token | None:
    if not isinstance(folder, LocalFolder):
        return None
    return Token.of(folder.path.absolute(), run)


@contextmanager
def _token_there(token: Token | None) -> Iterator[None]:
    if token is None:
        yield
        return
    token.path.write_bytes(token.content)
    try:
        yield
    finally:
        token.path.unlink(missing_ok=True)


def _what_is_not_there(folder: WritableFolder, receipt: Receipt) -> str | None:
    """A worker may have lost the shared folder, and have written to its own disk.

    In a store there is nothing that could be taken for it.
    """
    if not isinstance(folder, LocalFolder):
        return None
    for name, entry in receipt.entry.files.items():
        if folder.size(name) != entry.n_bytes:
            return f"a worker has written {folder}/{name}, which is not there or another file here"
    return None


class _Failures:
    """Shards that could not be made: the rest is, before that is said."""

    def __init__(self, n_shards: int) -> None:
        self._n_shards = n_shards
        self._errors: dict[int, BaseException] = {}

    def add(self, shards: Sequence[int], error: BaseException) -> None:
        """Raises ShardsFailed where too many fail for the rest to be worth while."""
        self._errors.update(dict.fromkeys(shards, error))
        if len(self._errors) >= GIVE_UP_AFTER:
            raise self._told(is_early=True)

    def check(self) -> None:
        """Raise where there is one: itself where it is the only one, and a user's to mend."""
        if not self._errors:
            return
        first = next(iter(self._errors.values()))
        if isinstance(first, UserError) and len(set(map(id, self._errors.values()))) == 1:
            raise first
        raise self._told(is_early=False)

    def _told(self, is_early: bool) -> ShardsFailed:
        failed = {k: _why(error) for k, error in sorted(self._errors.items())}
        return ShardsFailed(failed, self._n_shards, is_early)


def _why(error: BaseException) -> str:
    if type(error).__name__ == "KilledWorker":
        return "its worker died each time it was tried: its memory limit may be too low"
    if isinstance(error, UserError):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)}"


# ------------------------------------------------------------------------------------ the window

Outcome = tuple[tuple[int, ...], Receipts | BaseException]


class _Window:
    """Tasks in flight: as many as keep the workers busy, however many there are to do."""

    def __init__(self, client: Any, job: Job, called: str, make: Make) -> None:
        """called: the scheduler, in messages. make: what is done on a worker."""
        import cloudpickle
        from distributed import as_completed

        self._client = client
        self._job = job
        self._called = called
        self._make = make
        # As Dask itself does it: what a script or a notebook defines, such as a source, travels.
        self._pickled_job = cloudpickle.dumps(job)
        self._running = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        self._in_flight: dict[str, tuple[Any, tuple[int, ...]]] = {}
        self._size = TASKS_A_THREAD
        self._last_look = -LOOK_EVERY_S
        self._without_workers_since = time.monotonic()

    def outcomes(self, tasks: Iterator[ShardTask]) -> Generator[Outcome, None, None]:
        """Of each task its shards, with their receipts or why there are none; in any order."""
        try:
            self._fill(tasks)
            while self._in_flight:
                self._wait()
                for future, result in self._running.next_batch(block=False):
                    yield self._outcome(future, result)
                self._fill(tasks)
        finally:
            self._cancel()

    def _fill(self, tasks: Iterator[ShardTask]) -> None:
        while len(self._in_flight) < self._size:
            task = next(tasks, None)
            if task is None:
                return
            key = f"shard-{self._job.key}-{task.shards[0]}"
            submit = partial(self._client.submit, key=key, pure=False, retries=RETRIES)
            future = submit(_on_worker, self._make, self._pickled_job, pickle.dumps(task))
            self._in_flight[future.key] = (future, task.shards)
            self._running.add(future)

    def _wait(self) -> None:
        """Until a task has ended. Raises NotThere."""
        while not self._running.has_ready():
            if self._client.status in ("closing", "closed"):
                raise self._lost()
            self._look_after()
            time.sleep(POLL_S)
        self._look_after()

    def _look_after(self) -> None:
        """The window grows with the workers; where there are none, that is said."""
        now = time.monotonic()
        if now - self._last_look < LOOK_EVERY_S:
            return
        self._last_look = now
        try:
            n_threads = sum(self._client.nthreads().values())
        except Exception:  # the scheduler is gone, which its futures tell
            return
        self._size = TASKS_A_THREAD * max(1, n_threads)
        if n_threads:
            self._without_workers_since = now
        elif now - self._without_workers_since >= SAY_EVERY_S:
            self._without_workers_since = now
            log(f"no worker at {self._called}: waiting for one")

    def _outcome(self, future: Any, result: Any) -> Outcome:
        """Raises what is no one shard's: NotThere, OtherVersions, CannotMake."""
        _, shards = self._in_flight.pop(future.key)
        status = future.status
        future.release()
        if status in ("cancelled", "lost"):
            raise self._lost()
        if status == "error":
            error = result[1]
            if isinstance(error, ModuleNotFoundError):
                raise _not_ours("of a task", error)
            return shards, error
        answer = pickle.loads(result)
        if isinstance(answer, UserError):
            raise answer
        return shards, answer

    def _lost(self) -> NotThere:
        what = f"the Dask scheduler at {self._called} does not answer any more, or was restarted"
        return NotThere(what, "What is done is kept")

    def _cancel(self) -> None:
        """What runs at this moment runs on, and writes what is right."""
        futures = [future for future, _ in self._in_flight.values()]
        self._in_flight.clear()
        if futures and self._client.status == "running":
            with suppress(Exception):
                self._client.cancel(futures)
