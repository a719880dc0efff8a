"""From a source to a finished set: plan (pure) -> run -> commit.

A shard is hashed, fsynced and renamed before its receipt is written, and the manifest is written
last. A run that was killed goes on after its last receipt, and ends byte-identical.
"""

import platform
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from convert.cluster import Cluster
from convert.existing import find_set, finished, right_or_taken_back, say_other_names
from convert.failed import (
    FailedRows,
    columns_of_rows_read,
    most_failed,
    say_failed,
    write_failed,
)
from convert.plan import Part, Plan
from convert.run import Execution, RunResult, done_before, failed_of, run_plan
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
from shards.errors import Busy, ChangedSource, WrongSetting, WrongSource
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
)
from shards.spec import (
    Codecs,
    ConversionSettings,
    DatasetSpec,
    Field,
    is_number,
    is_whole,
)
from shards.writing import commit, resume
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
        raise ChangedSource(source, "changed while it was read", "Wait until it is whole")
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
    plan: Plan, source: Source, folder: WritableFolder, made: RunResult, seconds: float
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
    plan: Plan, source: Source, folder: WritableFolder, made: RunResult, seconds: float
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
        done = {**made.done, **done_before(folder, plan, others, are_hashed=False)}
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
    def of(cls, plan: Plan, made: RunResult) -> "ConvertedShards":
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


def _columns(plan: Plan, facts: RowFacts, receipts: Sequence[Receipt]) -> dict[str, ColumnValues]:
    """Every column: what the source tells, and what reading its rows told."""
    columns = dict(facts.columns)
    if plan.rows_differ:
        columns |= columns_of_rows_read([receipt.rows for receipt in receipts if receipt.rows])
    if facts.camera_px is not None:
        columns["camera"] = camera_shares_of(facts.camera_px, np.asarray(columns["size"]))
    return filled_columns(columns, plan.n_rows, facts.dataset, plan.settings.crop)


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
