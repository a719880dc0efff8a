"""The shards of a plan, made: those that no earlier run has done, by threads or on a cluster."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.cluster import Cluster, ClusterExecutor
from convert.executors import LocalExecutor, Made
from convert.failed import MANY_FAILED, FailedRows, most_failed, try_failed_again, write_failed
from convert.machine import n_cores
from convert.plan import Part, Plan, plan_tasks
from convert.shard import FullShard, is_train_of, write_shard
from convert.sources.base import RowFacts, Source, filled_columns
from shards.files import LocalFolder, WritableFolder, log
from shards.manifest import FAILED, Receipt, write_receipt
from shards.progress import megabytes
from shards.spec import Codecs
from shards.writing import check_space, resume


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What decides how a set is made, and not what is in it. See `convert`."""

    workers: int | None = None
    codecs: Codecs = None
    repair: bool = False
    max_failed: float = 0.0
    part: Part | None = None
    cluster: Cluster | None = None  # None: this machine's threads and helper processes
    # Told of each shard that is durable, (directory, number, receipt), those of an earlier run
    # first; it may not wait. Of sets on this machine's file systems alone.
    on_shard: Callable[[Path, int, Receipt], object] | None = None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run did of a plan.

    done: receipts by shard, those of earlier runs with them. peak_memory: bytes; None where the
    system does not tell. max_failed: the share of rows that may fail.
    """

    facts: RowFacts
    done: Mapping[int, Receipt]
    peak_memory: int | None
    max_failed: float


def run_plan(plan: Plan, source: Source, folder: WritableFolder, execution: Execution) -> RunResult:
    """Make the shards, or those of a part, that no receipt in `folder` says are done.

    Raises FailedRows where so many rows fail that the rest is not worth while.
    """
    n_shards = len(plan.bounds)
    mine = execution.part.shards(n_shards) if execution.part else range(n_shards)
    done = _still_good(folder, plan, mine, execution.max_failed)
    for k, receipt in done.items():
        _tell(execution, folder, k, receipt)
    todo = [k for k in mine if k not in done]

    executor = _executor(plan, source, folder, todo, execution)
    _say_what_comes(plan, folder, todo, executor.scratch_bytes)
    most = most_failed(plan.n_rows, execution.max_failed) + MANY_FAILED
    with (
        _thread_beside(source) as beside,  # text is read while pictures are decoded
        executor,
    ):
        facts: Future[RowFacts] = beside.submit(source.row_facts)
        n_failed = len(failed_of(done.values()))
        with closing(_put_down(executor, plan, folder, todo, facts)) as receipts:
            for k, receipt in receipts:
                done[k] = receipt
                _tell(execution, folder, k, receipt)
                n_failed += len(receipt.failed)
                if n_failed > most:
                    failed = failed_of(done.values())
                    _list_failed(folder, plan, source, facts.result(), failed)
                    listed = f"{folder}/{FAILED}"
                    raise FailedRows(source, failed, plan.n_rows, listed, is_early=True)
    return RunResult(
        facts=facts.result(),
        done=done,
        peak_memory=executor.peak_memory,
        max_failed=execution.max_failed,
    )


def _still_good(
    folder: WritableFolder, plan: Plan, mine: Collection[int], max_failed: float
) -> dict[int, Receipt]:
    """The receipts of earlier runs, but for shards whose failed rows are to be tried again."""
    done = done_before(folder, plan, mine)
    if failed_of(done.values()):  # whether they are too many, the rows of other parts tell too
        elsewhere = set(range(len(plan.bounds))) - set(mine)
        others = done_before(folder, plan, elsewhere, are_hashed=False)
        n_allowed = most_failed(plan.n_rows, max_failed) - len(failed_of(others.values()))
        try_failed_again(folder, done, n_allowed)
    return done


def _executor(
    plan: Plan, source: Source, folder: WritableFolder, todo: Sequence[int], execution: Execution
) -> LocalExecutor | ClusterExecutor:
    """Who makes these shards."""
    readers = source.readers([field.name for field in plan.fields])
    if execution.cluster is not None:
        return ClusterExecutor(plan, source, readers, folder, execution.cluster)
    tasks = plan_tasks(plan, [reader.group_rows for reader in readers], todo)
    return LocalExecutor(plan, source, readers, tasks, execution.workers or n_cores())


def _list_failed(
    folder: WritableFolder, plan: Plan, source: Source, facts: RowFacts, failed: Mapping[int, str]
) -> None:
    columns = filled_columns(facts.columns, plan.n_rows, source.dataset, "none")
    write_failed(folder, failed, columns)


def _put_down(
    executor: LocalExecutor | ClusterExecutor,
    plan: Plan,
    folder: WritableFolder,
    todo: Sequence[int],
    facts: "Future[RowFacts]",
) -> Made:
    """Each of these shards as it is durable, once its receipt is written."""
    if isinstance(executor, ClusterExecutor):
        with closing(executor.run(todo, facts)) as receipts:
            for k, receipt in receipts:
                write_receipt(folder, k, receipt)
                yield k, receipt
        return

    def write(shard: FullShard) -> Receipt:
        is_train = is_train_of(facts.result(), plan, shard.number)
        receipt = write_shard(plan, shard, is_train, folder)
        write_receipt(folder, shard.number, receipt)
        return receipt

    with closing(executor.run(_scratch(folder), write, facts)) as receipts:
        yield from receipts


def _tell(execution: Execution, folder: WritableFolder, shard: int, receipt: Receipt) -> None:
    if execution.on_shard is not None and isinstance(folder, LocalFolder):
        execution.on_shard(folder.path, shard, receipt)


def _say_what_comes(
    plan: Plan, folder: WritableFolder, todo: Sequence[int], scratch_bytes: int
) -> None:
    """Raises WrongPlace where it would not fit."""
    n_todo = sum(plan.n_rows_of(k) for k in todo)
    n_bytes = n_todo * plan.row_bytes + scratch_bytes
    free = ""
    if isinstance(folder, LocalFolder):
        free = f", {megabytes(check_space(folder.path, n_bytes))} free"
    if todo:
        log(f"{n_todo} rows to convert: {megabytes(n_bytes)} to write{free}")


def _scratch(folder: WritableFolder) -> Path:
    """A directory of this machine for what has to be unpacked first."""
    return folder.path if isinstance(folder, LocalFolder) else Path(tempfile.gettempdir())


def done_before(
    folder: WritableFolder, plan: Plan, among: Collection[int], *, are_hashed: bool = True
) -> dict[int, Receipt]:
    """The receipts of these shards that were made earlier, but for those of another decoder."""
    done = resume(folder, plan.form_of_shards, among, are_hashed=are_hashed)
    return {
        k: receipt
        for k, receipt in done.items()
        if receipt.decoder == plan.decoder and (receipt.rows is not None) == plan.rows_differ
    }


@contextmanager
def _thread_beside(source: Source) -> Iterator[ThreadPoolExecutor]:
    """A thread of its own; after Ctrl-C it is not waited for where a server may say nothing."""
    beside = ThreadPoolExecutor(1)
    wait = True
    try:
        yield beside
    except KeyboardInterrupt:
        wait = not source.may_hang
        raise
    finally:
        beside.shutdown(wait=wait, cancel_futures=True)


def failed_of(receipts: Iterable[Receipt]) -> dict[int, str]:
    """The rows of these shards that failed, by their numbers in the set."""
    failed: dict[int, str] = {}
    for receipt in receipts:
        failed |= receipt.failed
    return failed
