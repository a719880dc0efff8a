"""From a source to a finished set: plan (pure) -> run -> commit.

A shard is hashed, fsynced and renamed before its receipt is written, and the manifest is written
last. A run that was killed goes on after its last receipt, and ends byte-identical.
"""

import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from convert.cluster import Cluster, ClusterExecutor
from convert.executors import LocalExecutor, Made
from convert.existing import find_set, finished, right_or_taken_back, say_other_names
from convert.failed import (
    MANY_FAILED,
    FailedRows,
    columns_of_rows_read,
    most_failed,
    say_failed,
    try_failed_again,
    write_failed,
)
from convert.machine import n_cores
from convert.plan import Part, Plan, plan_tasks
from convert.shard import FullShard, is_train_of, write_shard
from convert.sources.base import (
    RowFacts,
    Source,
    SourceFilter,
    camera_shares_of,
    filled_columns,
    kinds_of_columns,
)
from convert.sources.nyu_mat import Elsewhere
from convert.sources.opening import open_source
from convert.statistics import statistics
from shards.addresses import without_secrets
from shards.containers import check_codecs
from shards.dataset import SetInStore, ShardSet, StoredSet, check_files
from shards.errors import Busy, WrongSetting, WrongSource
from shards.files import LocalFolder, WritableFolder, json_bytes, log, mebibytes
from shards.lock import hold, only_one
from shards.manifest import (
    FAILED,
    PROVENANCE,
    ColumnValues,
    Manifest,
    Receipt,
    receipt_name,
    remove_older_receipts,
    write_receipt,
)
from shards.progress import megabytes
from shards.spec import (
    Codecs,
    ConversionSettings,
    DatasetSpec,
    Field,
    is_number,
    is_whole,
)
from shards.writing import check_space, commit, resume
from stores.base import Root
from stores.places import root_at

MAX_WORKERS = 256


def convert(
    source: Source | Elsewhere | Path | str,
    out: Path | str,
    settings: ConversionSettings,
    *,
    workers: int | None = None,
    codecs: Codecs = None,
    repair: bool = False,
    max_failed: float = 0.0,
    client: Any = None,
) -> str:
    """Convert `source` into a folder under `out`: its path. A finished one stays as it is.

    out: a path, or the address of a place that fsspec opens, such as s3://bucket/sets.
    source: the path of a .mat, of a table of frames or of a directory of a known layout; a .mat
    that lies elsewhere; or any open Source, which stays open.
    workers: threads and processes; None: one a core. codecs: one for each field of a Zarr set;
    None: .npy. repair: check a finished set byte for byte, and make the shards that are wrong, or
    have rows that failed, again. max_failed: the share of rows that may fail in a set that is
    published; they are in it, empty, with a status that training leaves out. client: a
    dask.distributed.Client whose workers make the shards; it is not closed.

    Raises UserError for anything a user can mend. Peak memory is about two shards and a few rows.
    """
    execution = Execution(
        workers=workers,
        codecs=codecs,
        repair=repair,
        max_failed=max_failed,
        cluster=None if client is None else Cluster(client=client),
    )
    made = convert_to_set(source, out, settings, execution)
    assert made is not None  # as it is not one part of it
    return str(made.address)


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


def convert_to_set(
    source: Source | Elsewhere | Path | str,
    out: Path | str,
    settings: ConversionSettings,
    execution: Execution,
) -> StoredSet | None:
    """`convert`, for who goes on with the set: it is handed on as it was opened or written.

    None where only a part is made, and other parts are not done yet.
    """
    _check_arguments(settings, execution)
    root = root_at(_place("out", out), replaces=execution.repair)
    if isinstance(source, Source):
        return _convert_source(source, root, settings, execution)

    place = source if isinstance(source, Elsewhere) else Path(_place("source", source))
    if not _is_there(place) and isinstance(root, LocalFolder):
        wanted = SourceFilter(name=place.name)
        form = "" if execution.codecs is None else ".zarr"
        found = find_set(root.path, settings, wanted, (form,))
        if found is not None:
            check_files(found)
            log(f"{place} is not there, nor needed: {found.path} is complete")
            return found
    with closing(open_source(place, settings)) as opened:
        return _convert_source(opened, root, settings, execution)


def _is_there(place: Elsewhere | Path) -> bool:
    """Also where that cannot be told (no permission, a name too long): opening it says why."""
    try:
        return place.exists()
    except OSError:
        return True


def _place(name: str, given: Any) -> Path | str:
    if not isinstance(given, str | Path) or not str(given) or "\0" in str(given):
        raise WrongSetting(name, repr(given), "expected a path")
    return given


def _check_arguments(settings: Any, execution: Execution) -> None:
    """Before anything is opened: a mistake from Python shows as one line too."""
    if not isinstance(settings, ConversionSettings):
        raise WrongSetting(
            "settings", repr(settings), "expected shards.spec.ConversionSettings(...)"
        )
    workers = execution.workers
    if workers is not None and not (is_whole(workers) and 1 <= workers <= MAX_WORKERS):
        choices = f"choose 1 to {MAX_WORKERS}, or None for one a core"
        raise WrongSetting("workers", repr(workers), choices)
    if not isinstance(execution.repair, bool):
        raise WrongSetting("repair", repr(execution.repair), "True or False")
    if not is_number(execution.max_failed) or not 0 <= execution.max_failed <= 1:
        raise WrongSetting("max_failed", repr(execution.max_failed), "choose a share, 0 to 1")
    if execution.cluster is not None:
        execution.cluster.check()
    # Which fields need one is known once the source is open.
    codecs = execution.codecs
    check_codecs(codecs, list(codecs) if isinstance(codecs, dict) else settings.fields)


def _convert_source(
    source: Source, root: Root, settings: ConversionSettings, execution: Execution
) -> StoredSet | None:
    before = source.stamp()
    plan = make_plan(source, settings, execution.codecs)
    folder = root.child(plan.directory_name)
    if not execution.repair:
        there = finished(folder, plan)
        if there is not None:
            say_other_names(there, source)
            return there

    with _held(folder, execution.part):
        if execution.repair:
            there = right_or_taken_back(folder, plan)
        else:
            there = finished(folder, plan)  # by another run, meanwhile
        if there is None:
            there = _made(plan, source, folder, execution, before)
    if there is not None and execution.part is not None:
        _sweep(folder)
    return there


def _made(
    plan: Plan,
    source: Source,
    folder: WritableFolder,
    execution: Execution,
    before: tuple[int, ...],
) -> StoredSet | None:
    """The set; None where only a part of it is there. before: the source's stamp."""
    started = time.perf_counter()
    _make_ready(folder, before[-1], execution.part)
    made = run_plan(plan, source, folder, execution)
    if (source.stamp(), source.identity()) != (before, plan.source):
        folder.delete(*map(receipt_name, made.done))
        raise WrongSource(source, "changed while it was read", "Wait until it is whole")
    seconds = time.perf_counter() - started
    if execution.part is not None:
        return _finish_part(plan, source, folder, made, seconds)
    if execution.cluster is not None and isinstance(folder, LocalFolder):
        folder.remove_unfinished()  # of workers that were killed
    return _finish(plan, source, folder, made, seconds)


def _sweep(folder: WritableFolder) -> None:
    """The last part to leave a finished set removes what parts that were killed left in it."""
    if isinstance(folder, LocalFolder):
        with suppress(Busy), only_one(folder.path.parent, folder.name):
            folder.remove_unfinished()


@contextmanager
def _held(folder: WritableFolder, part: Part | None) -> Iterator[None]:
    """Nobody else converts into it meanwhile, but for other parts.

    In a store nobody is kept out: who writes the same set writes the same objects.
    """
    if not isinstance(folder, LocalFolder):
        yield
        return
    path = folder.path
    with only_one(path.parent, path.name, shared=part is not None):
        yield


def _make_ready(folder: WritableFolder, changed_ns: int, part: Part | None) -> None:
    """changed_ns: when the source was written to; what was made of it before is not taken.

    Parts may have sources of their own, copied later to each machine: the fingerprint, which has
    the source's identity, is all that tells then.
    """
    if not isinstance(folder, LocalFolder):
        return
    folder.path.mkdir(exist_ok=True)
    if part is None:
        folder.remove_unfinished()
        remove_older_receipts(folder.path, changed_ns)


def _finish(
    plan: Plan, source: Source, folder: WritableFolder, made: "RunResult", seconds: float
) -> StoredSet:
    """The commit. Raises FailedRows."""
    shards = ConvertedShards.of(plan, made)
    write_failed(folder, shards.failed, shards.columns)
    if len(shards.failed) > most_failed(plan.n_rows, made.max_failed):
        listed = f"{folder}/{FAILED}"
        raise FailedRows(source, shards.failed, plan.n_rows, listed, is_early=False)
    folder.put(PROVENANCE, json_bytes(_provenance(source, seconds, made.peak_memory)))
    manifest = commit(folder, shards.manifest(plan), shards.columns)
    say_failed(shards.failed, plan.n_rows, folder)
    log(f"{plan.n_rows} rows in {seconds:.1f} s, peak memory {mebibytes(made.peak_memory)}")
    if isinstance(folder, LocalFolder):
        return ShardSet(folder.path, manifest)
    return SetInStore(folder, manifest)


def _finish_part(
    plan: Plan, source: Source, folder: WritableFolder, made: "RunResult", seconds: float
) -> StoredSet | None:
    """The part that finds all of them done is the one that commits; None: another one will.

    Every part looks after its last receipt is written, so one of them finds all. Raises FailedRows,
    and OtherDecoder where all are done and the parts have not the same decoder.
    """
    with _held_to_commit(folder):
        there = finished(folder, plan)
        if there is not None:
            return there
        others = set(range(len(plan.bounds))) - made.done.keys()
        done = {**made.done, **_done_before(folder, plan, others, are_hashed=False)}
        if len(done) == len(plan.bounds):
            return _finish(plan, source, folder, replace(made, done=done), seconds)
        # Without locks, or in a store, another part may have finished it and removed receipts.
        there = finished(folder, plan)
        if there is not None:
            return there
        _check_decoders(folder, plan, others - done.keys())
        so_far = f"{len(done)} of {len(plan.bounds)} shards are done"
        log(f"{so_far}: the part that makes the last one finishes the set")
        return None


class OtherDecoder(WrongSource):
    """Shards that another decoder made: those of one set are made by one."""


def _check_decoders(folder: WritableFolder, plan: Plan, missing: Collection[int]) -> None:
    """Raise OtherDecoder where nothing else is missing than shards of another decoder: each part
    would wait for another one.
    """
    found = resume(folder, plan.form_of_shards, missing, are_hashed=False)
    decoders = {receipt.decoder for receipt in found.values()} - {plan.decoder}
    if len(found) < len(missing) or not decoders:
        return
    what = f"{len(missing)} of its shards were decoded by {decoders.pop()}, here is {plan.decoder}"
    right = "Give every machine the same, and make these parts again"
    raise OtherDecoder(folder, f": {what}", right)


@contextmanager
def _held_to_commit(folder: WritableFolder) -> Iterator[None]:
    if not isinstance(folder, LocalFolder):
        yield
        return
    path = folder.path
    with hold(path.parent / f".{path.name}.commit.lock", path, "finished", wait=True):
        yield


# ---------------------------------------------------------------------------------------- plan, run


def make_plan(source: Source, settings: ConversionSettings, codecs: Codecs) -> Plan:
    """What a conversion of this source with these settings will do. Raises WrongSetting."""
    chosen = source.resolved(settings)
    check_codecs(codecs, chosen.fields)
    source.check_crop(chosen.crop)
    box = None if chosen.crop == "none" else source.dataset.crop_box(chosen.crop)
    fields = [source.fields[name] for name in chosen.fields]
    return Plan(
        dataset=source.dataset.name,
        settings=chosen,
        source=source.identity(),
        fields=[_as_resized(field, chosen) for field in fields],
        n_rows=source.n_rows,
        box=box,
        codecs=codecs,
        decoder=source.decoder,
        rows_differ=source.rows_differ,
    )


def _as_resized(field: Field, settings: ConversionSettings) -> Field:
    return replace(field, resampling=settings.depth_resize) if field.kind == "depth" else field


@dataclass(frozen=True, kw_only=True)
class ConvertedShards:
    """All shards of a plan, durable, and what was found out meanwhile."""

    facts: RowFacts
    columns: Mapping[str, ColumnValues]
    receipts: Sequence[Receipt]

    @classmethod
    def of(cls, plan: Plan, made: "RunResult") -> "ConvertedShards":
        """Of a run that has done every shard."""
        receipts = [made.done[k] for k in range(len(plan.bounds))]
        columns = _columns(plan, made.facts, receipts)
        return cls(facts=made.facts, columns=columns, receipts=receipts)

    @property
    def failed(self) -> dict[int, str]:
        """By a row's number in the set, what is wrong with it."""
        return failed_of(self.receipts)

    def manifest(self, plan: Plan) -> Manifest:
        """Without the columns, which are written with it."""
        fields = {}
        for field in plan.fields:
            sums = [receipt.entry.sums[field.name] for receipt in self.receipts]
            fields[field.name] = replace(field, statistics=statistics(sums))
        return Manifest(
            dataset=self._dataset(),
            source=plan.source,
            settings=plan.settings,
            n_rows=plan.n_rows,
            fields=fields,
            shards=[receipt.entry for receipt in self.receipts],
            scenes=self.facts.scenes,
            codecs=plan.codecs,
            decoder=plan.decoder,
            columns=kinds_of_columns(self.columns),
        )

    def _dataset(self) -> DatasetSpec:
        """With a name for every label: where the source has none, its number."""
        dataset = self.facts.dataset
        rows = [receipt.rows for receipt in self.receipts if receipt.rows]
        highest = [each.highest["label"] for each in rows if "label" in each.highest]
        names = dataset.label_names
        without = range(len(names) + 1, max(highest, default=0) + 1)
        return replace(dataset, label_names=(*names, *map(str, without)))


def failed_of(receipts: Iterable[Receipt]) -> dict[int, str]:
    """The rows of these shards that failed, by their numbers in the set."""
    failed: dict[int, str] = {}
    for receipt in receipts:
        failed |= receipt.rows.failed if receipt.rows else {}
    return failed


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
    done = _done_before(folder, plan, mine)
    if failed_of(done.values()):  # whether they are too many, the rows of other parts tell too
        elsewhere = set(range(n_shards)) - set(mine)
        others = _done_before(folder, plan, elsewhere, are_hashed=False)
        n_allowed = most_failed(plan.n_rows, execution.max_failed) - len(failed_of(others.values()))
        try_failed_again(folder, done, n_allowed)
    for k, receipt in done.items():
        _tell(execution, folder, k, receipt)
    todo = [k for k in mine if k not in done]
    readers = source.readers([field.name for field in plan.fields])
    executor: LocalExecutor | ClusterExecutor
    if execution.cluster is not None:
        executor = ClusterExecutor(plan, source, readers, folder, execution.cluster)
        scratch_bytes = 0
    else:
        tasks = plan_tasks(plan, [reader.group_rows for reader in readers], todo)
        scratch_bytes = sum(reader.scratch_bytes for reader in readers) if tasks else 0
        workers = execution.workers or n_cores()
        executor = LocalExecutor(plan, source, readers, tasks, workers)
    _say_what_comes(plan, folder, todo, scratch_bytes)
    with (
        _thread_beside(source) as beside,  # text is read while pictures are decoded
        executor,
    ):
        facts: Future[RowFacts] = beside.submit(source.row_facts)
        n_failed = len(failed_of(done.values()))
        too_many = most_failed(plan.n_rows, execution.max_failed) + MANY_FAILED
        with closing(_put_down(executor, plan, folder, todo, facts)) as receipts:
            for k, receipt in receipts:
                done[k] = receipt
                _tell(execution, folder, k, receipt)
                n_failed += len(receipt.rows.failed) if receipt.rows else 0
                if n_failed > too_many:
                    failed = failed_of(done.values())
                    columns = filled_columns(
                        facts.result().columns, plan.n_rows, source.dataset, "none"
                    )
                    write_failed(folder, failed, columns)
                    listed = f"{folder}/{FAILED}"
                    raise FailedRows(source, failed, plan.n_rows, listed, is_early=True)
    return RunResult(
        facts=facts.result(),
        done=done,
        peak_memory=executor.peak_memory,
        max_failed=execution.max_failed,
    )


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


def _done_before(
    folder: WritableFolder, plan: Plan, among: Collection[int], *, are_hashed: bool = True
) -> dict[int, Receipt]:
    """The receipts of these shards that were made earlier, but for those of another decoder."""
    done = resume(folder, plan.form_of_shards, among, are_hashed=are_hashed)
    return {
        k: receipt
        for k, receipt in done.items()
        if receipt.decoder == plan.decoder and (receipt.rows is not None) == plan.rows_differ
    }


def _columns(plan: Plan, facts: RowFacts, receipts: Sequence[Receipt]) -> dict[str, ColumnValues]:
    """Every column: what the source tells, and what reading its rows told."""
    columns = dict(facts.columns)
    if plan.rows_differ:
        columns |= columns_of_rows_read([receipt.rows for receipt in receipts if receipt.rows])
    if facts.camera_px is not None:
        columns["camera"] = camera_shares_of(facts.camera_px, np.asarray(columns["size"]))
    return filled_columns(columns, plan.n_rows, facts.dataset, plan.settings.crop)


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


def _provenance(source: Source, seconds: float, peak_memory: int | None) -> dict[str, Any]:
    packages = {}
    for name in ("nyuv2-shards", "numpy", "h5py", "torch", "deflate", "imagecodecs", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    return {
        "command": without_secrets(shlex.join(sys.argv)),
        "source_path": without_secrets(str(source)),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory,
        "python": platform.python_version(),
        "versions": packages,
    }
