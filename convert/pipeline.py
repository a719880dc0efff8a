"""From a source to a finished set: plan (pure) -> run -> commit.

A shard is hashed, fsynced and renamed before its receipt is written, and the manifest is written
last. A run that was killed goes on after its last receipt, and ends byte-identical.
"""

import errno
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from convert.executors import FullShard, LocalExecutor
from convert.failed import (
    MANY_FAILED,
    FailedRows,
    columns_of_rows_read,
    most_failed,
    rows_read_of,
    say_failed,
    shards_with_failed_rows,
    try_failed_again,
    write_failed,
)
from convert.machine import n_cores
from convert.plan import Plan, plan_tasks
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
from convert.statistics import statistics, train_sums
from convert.upgrade import read_or_upgrade, read_version_1, upgrade, upgraded_if_it_fits
from shards.containers import check_codecs, write_field
from shards.dataset import ShardSet, check_files, finished_sets, verify
from shards.errors import DamagedSet, OldSet, SeveralSets, UserError, WrongSetting, WrongSource
from shards.files import FileEntry, log, mebibytes, write_json
from shards.lock import only_one
from shards.manifest import (
    FAILED,
    MANIFEST,
    PROVENANCE,
    ChannelSums,
    ColumnValues,
    Manifest,
    Receipt,
    RowsRead,
    ShardEntry,
    read_manifest,
    remove_receipts,
    write_receipt,
    write_receipts,
)
from shards.progress import megabytes
from shards.spec import (
    SPLITS,
    Codecs,
    ConversionSettings,
    DatasetSpec,
    Field,
    is_number,
    is_whole,
)
from shards.writing import check_space, commit, finished_set, resume, take_as_finished

MAX_WORKERS = 256
TRAIN = SPLITS.index("train")


def convert(
    source: Source | Elsewhere | Path | str,
    out: Path | str,
    settings: ConversionSettings,
    *,
    workers: int | None = None,
    codecs: Codecs = None,
    repair: bool = False,
    max_failed: float = 0.0,
) -> str:
    """Convert `source` into a directory under `out`: its path. A finished one stays as it is.

    source: the path of a .mat, of a table of frames or of a directory of a known layout; a .mat
    that lies elsewhere; or any open Source, which stays open.
    workers: threads and processes; None: one a core. codecs: one for each field of a Zarr set;
    None: .npy. repair: check a finished set byte for byte, and make the shards that are wrong, or
    have rows that failed, again. max_failed: the share of rows that may fail in a set that is
    published; they are in it, empty, with a status that training leaves out.

    Raises UserError for anything a user can mend. Peak memory is about two shards and a few rows.
    """
    execution = Execution(workers=workers, codecs=codecs, repair=repair, max_failed=max_failed)
    return str(convert_to_set(source, out, settings, execution).path)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What decides how a set is made, and not what is in it. See `convert`."""

    workers: int | None = None
    codecs: Codecs = None
    repair: bool = False
    max_failed: float = 0.0
    # Told of each shard that is durable, (directory, number, receipt), those of an earlier run
    # first; it may not wait.
    on_shard: Callable[[Path, int, Receipt], object] | None = None


def convert_to_set(
    source: Source | Elsewhere | Path | str,
    out: Path | str,
    settings: ConversionSettings,
    execution: Execution,
) -> ShardSet:
    """`convert`, for who goes on with the set: it is handed on as it was opened or written."""
    _check_arguments(settings, execution)
    root = _path("out", out)
    if isinstance(source, Source):
        return _convert_source(source, root, settings, execution)

    place = source if isinstance(source, Elsewhere) else _path("source", source)
    if not _is_there(place):
        wanted = SourceFilter(name=place.name)
        form = "" if execution.codecs is None else ".zarr"
        found = find_set(root, settings, wanted, (form,))
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


def _path(name: str, given: Any) -> Path:
    if not isinstance(given, str | Path) or not str(given) or "\0" in str(given):
        raise WrongSetting(name, repr(given), "expected a path")
    return Path(given)


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
    # Which fields need one is known once the source is open.
    codecs = execution.codecs
    check_codecs(codecs, list(codecs) if isinstance(codecs, dict) else settings.fields)


def _convert_source(
    source: Source, root: Path, settings: ConversionSettings, execution: Execution
) -> ShardSet:
    started = time.perf_counter()
    before = source.stamp()
    plan = make_plan(source, settings, execution.codecs)
    directory = root / plan.directory_name
    if not execution.repair:
        finished = _finished(directory, plan)
        if finished is not None:
            _say_other_names(finished, source)
            return finished

    with only_one(root, directory.name):
        if execution.repair:
            finished = _right_or_taken_back(directory, plan)
        else:
            finished = _finished(directory, plan)  # by another run, meanwhile
        if finished is not None:
            return finished
        directory.mkdir(exist_ok=True)
        remove_receipts(directory, older_than_ns=before[-1])

        made = run_plan(plan, source, directory, execution)
        if (source.stamp(), source.identity()) != (before, plan.source):
            remove_receipts(directory)
            raise WrongSource(source, "changed while it was read", "Wait until it is whole")
        write_failed(directory, made.failed, made.columns)
        if len(made.failed) > most_failed(plan.n_rows, execution.max_failed):
            listed = directory / FAILED
            raise FailedRows(source, made.failed, plan.n_rows, listed, is_early=False)
        seconds = time.perf_counter() - started
        write_json(directory / PROVENANCE, _provenance(source, seconds, made.peak_memory))
        converted = commit(directory, made.manifest(plan), made.columns)
    say_failed(made.failed, plan.n_rows, directory)
    log(f"{plan.n_rows} rows in {seconds:.1f} s, peak memory {mebibytes(made.peak_memory)}")
    return converted


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
    peak_memory: int | None  # bytes; None where the system does not tell

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


def run_plan(plan: Plan, source: Source, directory: Path, execution: Execution) -> ConvertedShards:
    """Make the shards that no receipt in `directory` says are done. Raises FailedRows where so many
    rows fail that the rest is not worth while.
    """
    done = _done_before(directory, plan)
    try_failed_again(done, plan.n_rows, execution.max_failed)
    on_shard = execution.on_shard or _nobody
    for k, receipt in done.items():
        on_shard(directory, k, receipt)
    readers = source.readers([field.name for field in plan.fields])
    tasks = plan_tasks(plan, [reader.group_rows for reader in readers], done)
    n_todo = sum(plan.n_rows_of(k) for k in range(len(plan.bounds)) if k not in done)
    scratch_bytes = sum(reader.scratch_bytes for reader in readers) if tasks else 0
    n_bytes = n_todo * plan.row_bytes + scratch_bytes
    free = check_space(directory, n_bytes)
    if tasks:
        log(f"{n_todo} rows to convert: {megabytes(n_bytes)} to write, {megabytes(free)} free")

    with (
        _thread_beside(source) as beside,  # text is read while pictures are decoded
        LocalExecutor(plan, source, readers, tasks, execution.workers or n_cores()) as executor,
    ):
        facts: Future[RowFacts] = beside.submit(source.row_facts)

        def write(shard: FullShard) -> Receipt:
            split = facts.result().columns.get("split", np.full(plan.n_rows, TRAIN))
            return write_shard(plan, shard, np.asarray(split) == TRAIN, directory)

        too_many = most_failed(plan.n_rows, execution.max_failed) + MANY_FAILED
        for k, receipt in executor.run(directory, write, facts):
            done[k] = receipt
            on_shard(directory, k, receipt)
            failed = failed_of(done.values()) if receipt.rows and receipt.rows.failed else {}
            if len(failed) > too_many:
                columns = filled_columns(
                    facts.result().columns, plan.n_rows, source.dataset, "none"
                )
                write_failed(directory, failed, columns)
                raise FailedRows(source, failed, plan.n_rows, directory / FAILED, is_early=True)
    receipts = [done[k] for k in range(len(plan.bounds))]
    return ConvertedShards(
        facts=facts.result(),
        columns=_columns(plan, facts.result(), receipts),
        receipts=receipts,
        peak_memory=executor.peak_memory,
    )


def _done_before(directory: Path, plan: Plan) -> dict[int, Receipt]:
    """The receipts of an earlier run, but for shards that another decoder made."""
    done = resume(directory, plan.bounds, plan.fields, plan.codecs)
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


def _nobody(_directory: Path, _shard: int, _receipt: Receipt) -> None:
    """Where nobody is to be told of shards."""


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


def write_shard(plan: Plan, shard: FullShard, is_train: np.ndarray, directory: Path) -> Receipt:
    """Make a shard durable, then its receipt. The same plan, number and source give the same bytes.

    is_train: [N] of all rows; statistics are of these, but for those that failed.
    """
    start, stop = plan.bounds_of(shard.number)
    is_counted = is_train[start:stop].copy()
    is_counted[[row - start for row in shard.failed]] = False
    train_rows = np.flatnonzero(is_counted)
    files: dict[str, FileEntry] = {}
    sums: dict[str, tuple[ChannelSums, ...]] = {}
    for field in plan.fields:
        rows = shard.arrays[field.name]
        files |= write_field(directory, field, shard.number, rows, plan.form)
        sums[field.name] = train_sums(field, (rows[place] for place in train_rows))
    receipt = Receipt(
        entry=ShardEntry(start=start, stop=stop, files=files, sums=sums),
        codecs=plan.codecs,
        decoder=plan.decoder,
        rows=_rows_read(plan, shard) if plan.rows_differ else None,
    )
    write_receipt(directory, shard.number, receipt)
    return receipt


def _rows_read(plan: Plan, shard: FullShard) -> RowsRead:
    ids = [field.name for field in plan.fields if field.kind == "id"]
    return RowsRead(
        sizes=shard.sizes.copy(),  # its buffer is used again
        failed=shard.failed,
        highest={name: int(shard.arrays[name].max()) for name in ids},
    )


def _provenance(source: Source, seconds: float, peak_memory: int | None) -> dict[str, Any]:
    packages = {}
    for name in ("nyuv2-shards", "numpy", "h5py", "torch", "deflate", "imagecodecs", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    return {
        "command": shlex.join(sys.argv),
        "source_path": str(source),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory,
        "python": platform.python_version(),
        "versions": packages,
    }


# ------------------------------------------------------------------------------------ what is there


def find_set(
    root: Path, settings: ConversionSettings, wanted: SourceFilter, forms: Sequence[str]
) -> ShardSet | None:
    """The finished set of these settings under `root`, of a wanted source; None: there is none.

    Only manifests are read, but a set of version 1 that fits is brought to this version. Raises
    SeveralSets where sets of several sources fit, and OSError where a mount fails.
    """
    found: dict[str, ShardSet] = {}
    for path in finished_sets(root):
        if path.suffix not in forms:
            continue
        try:
            candidate = _read_or_upgrade(path, settings, wanted)
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno not in (errno.ELOOP, errno.ENOENT):
                raise  # such as a mount that fails
            log(f"passed over: {error}")
            continue
        if candidate is None:
            continue
        manifest = candidate.manifest
        if settings.fits(manifest.settings) and wanted.accepts(manifest.source):
            found.setdefault(manifest.fingerprint, candidate)
    if len(found) > 1:
        raise SeveralSets(root, [each.path for each in found.values()])
    return next(iter(found.values()), None)


def _read_or_upgrade(
    path: Path, settings: ConversionSettings, wanted: SourceFilter
) -> ShardSet | None:
    try:
        return ShardSet(path, read_manifest(path))
    except OldSet:
        return upgraded_if_it_fits(path, settings, wanted)


def _finished(directory: Path, plan: Plan) -> ShardSet | None:
    """The set if it is there; a set of version 1 in its place is brought to this one."""
    try:
        return finished_set(directory, plan.fingerprint, plan.codecs)
    except OldSet:
        upgrade(directory)
        return finished_set(directory, plan.fingerprint, plan.codecs)


def _say_other_names(found: ShardSet, source: Source) -> None:
    """Names of labels decide no stored byte: a finished set keeps those that it has."""
    given = source.dataset.label_names
    if given and given != found.dataset.label_names:
        log(f"{found.path} keeps the label names that it has: to change them, delete it first")


def _right_or_taken_back(directory: Path, plan: Plan) -> ShardSet | None:
    """The set if every byte of it is right; None where it has to be made.

    A damaged one is made an unfinished one again, with receipts of the shards that are right.
    """
    if not os.path.lexists(directory / MANIFEST):
        return None
    try:
        found = read_or_upgrade(directory)
    except DamagedSet as error:
        log(str(error))
        _keep_shards_of_version_1(directory)
        _take_back(directory)
        return None

    wrong = {name: problem for name, problem in verify(found) if problem}
    for name, problem in wrong.items():
        log(f"{directory / name} {problem}")
    failed = shards_with_failed_rows(found)
    if wrong or failed:
        to_be_made = [name for k in failed for name in found.manifest.shards[k].files]
        write_receipts(directory, found.manifest, {*wrong, *to_be_made}, rows_read_of(found))
        _take_back(directory)
        return None
    check_files(found)
    take_as_finished(found, plan.fingerprint, plan.codecs)
    return found


def _take_back(directory: Path) -> None:
    """Without its manifest a set is an unfinished one."""
    (directory / MANIFEST).unlink()
    log(f"{directory} is made again where it is wrong")


def _keep_shards_of_version_1(directory: Path) -> None:
    """Receipts of its shards, which are checked again: only something else may be damaged."""
    with suppress(DamagedSet):
        old = read_version_1(directory)
        for k, shard in enumerate(old.shards):
            write_receipt(directory, k, Receipt(entry=shard, codecs=old.codecs))
