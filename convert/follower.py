"""Finished shards go to Drive while the next ones are made: a session that is cut keeps them.

    conversion   shard k is durable, then its receipt -> on_shard(directory, k, receipt), no wait
    Follower     k is packed, its receipt -> its files to Drive, each read back -> receipt to Drive

What lies on Drive then is an unfinished set: no manifest, and a receipt for each shard that is
whole there. `take_up` copies it to another machine, where a conversion goes on after it. Whatever
fails here is said once and left to the push at the end, which does all that is not there yet.
"""

import json
import os
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from convert.plan import Plan
from shards.containers import ShardForm, write_field
from shards.errors import ChangedSource, DamagedSet, DamagedSource, IncompleteCopy, one_line
from shards.files import FileEntry, log
from shards.manifest import (
    Receipt,
    read_receipt,
    receipt_name,
    remove_receipts,
    shard_file,
    write_receipt,
)
from shards.progress import Progress, megabytes
from shards.spec import Codecs
from shards.strict_json import JsonObject
from shards.writing import SPARE_BYTES
from stores.local import LocalStore
from stores.mounted import MountedStore

NICE = 10  # of 19: the conversion goes first where there are fewer cores than threads


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is durable under `directory`."""

    directory: Path
    number: int
    receipt: Receipt


class Follower:
    """Called with each shard that is done; packs and copies it in a thread of its own."""

    def __init__(self, plan: Plan, packed: Path, drive: Path, codecs: Codecs) -> None:
        """packed: the directory of the packed set on this disk, which a plain conversion is packed
        into with `codecs`; one that is packed already is copied as it lies.
        """
        self.plan = plan
        self.packed = packed
        self.store = MountedStore(drive / packed.name)
        self.codecs = codecs
        self.n_bytes_to_come = plan.n_rows * plan.row_bytes  # of the plain set
        self.read_back: dict[str, FileEntry] = {}  # files that are right on Drive
        self._todo: queue.SimpleQueue[FinishedShard | None] = queue.SimpleQueue()
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, directory: Path, number: int, receipt: Receipt) -> None:
        """Never waits and never fails."""
        self.n_bytes_to_come -= self.plan.n_rows_of(number) * self.plan.row_bytes
        self._todo.put(FinishedShard(directory, number, receipt))

    def __enter__(self) -> "Follower":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The shard on its way is waited for, but not after Ctrl-C: a mount may say nothing.

        Where the source turned out to have other bytes than it should, nobody may go on from what
        was made of it. (One that cannot be read, or has rows that fail, is no such thing.)
        """
        self._is_ending = True
        self._todo.put(None)
        if kind is not KeyboardInterrupt:
            self._thread.join()
        if isinstance(error, ChangedSource | DamagedSource):
            self._withdraw()

    def _withdraw(self) -> None:
        remove_receipts(LocalStore(self.packed))
        try:
            self.store.delete(*map(receipt_name, range(len(self.plan.bounds))))
        except Exception as error:  # what ended the conversion is told in any case
            log(f"{self.store} has shards of it, to be removed by hand ({one_line(error)})")

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # a thread has a priority of its own on Linux alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            while (shard := self._todo.get()) is not None and not self._is_ending:
                self._follow(shard)
        except Exception as error:  # a mounted Drive fails in many ways; the push at the end tells
            what = "the conversion goes on, and the rest is copied at its end"
            log(f"shards do not go to {self.store} one by one ({one_line(error)}): {what}")

    def _follow(self, shard: FinishedShard) -> None:
        receipt = shard.receipt
        directory = shard.directory
        if receipt.codecs is None:
            self._check_room(receipt)
            receipt = self._packed(shard)
            directory = self.packed
        MountedStore(self.store.path.parent).create()
        self.store.create()
        for name, entry in receipt.entry.files.items():
            self.store.upload(directory / name, name, entry)
            self.read_back[name] = entry
        name = receipt_name(shard.number)
        self.store.upload(directory / name, name)

    def _packed(self, shard: FinishedShard) -> Receipt:
        """The receipt of its packed form, which an earlier session may have made."""
        packed = LocalStore(self.packed)
        made = read_receipt(packed, shard.number)
        if made is not None and made.has_rows_of(shard.receipt) and self._is_there(made):
            return made
        form = ShardForm(codecs=self.codecs, n_slots=self.plan.settings.rows_per_shard)
        files: dict[str, FileEntry] = {}
        for field in self.plan.fields:
            path = shard.directory / shard_file(field, shard.number, False)
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            files |= write_field(packed, field, shard.number, rows, form)
        entry = replace(shard.receipt.entry, files=files)
        receipt = replace(shard.receipt, entry=entry, codecs=self.codecs)
        write_receipt(packed, shard.number, receipt)
        return receipt

    def _is_there(self, receipt: Receipt) -> bool:
        """As far as sizes tell; every byte is hashed on its way to Drive."""
        here = LocalStore(self.packed)
        files = receipt.entry.files
        is_whole = all(here.size(name) == entry.n_bytes for name, entry in files.items())
        return is_whole and receipt.codecs == self.codecs

    def _check_room(self, receipt: Receipt) -> None:
        """Raise OSError before packing would take the room that the conversion needs."""
        n_bytes = sum(entry.n_bytes for entry in receipt.entry.files.values())
        need = max(self.n_bytes_to_come, 0) + n_bytes + SPARE_BYTES
        self.packed.mkdir(parents=True, exist_ok=True)
        free = LocalStore(self.packed).free_bytes()
        if need > free:
            raise OSError(f"{megabytes(free)} are free on this disk, {megabytes(need)} are needed")


# ------------------------------------------------------------------ what a cut session left there


def take_up(plan: Plan, drive: Path, packed: Path) -> int:
    """Copy the shards that are whole on Drive into `packed`, with their receipts; how many.

    plan: of the packed set. A shard of which a file is absent, short or has other bytes is left
    out. Raises StoreFailed.
    """
    store = MountedStore(drive / packed.name)
    receipts = _receipts_of(store, plan)
    if not receipts:
        return 0
    files = {name: e for receipt in receipts.values() for name, e in receipt.entry.files.items()}
    n_bytes = sum(entry.n_bytes for entry in files.values())
    log(f"{store} has {len(receipts)} shards of a session that was cut: {megabytes(n_bytes)}")
    n_taken = 0
    with Progress("reading", n_bytes) as progress:
        for number, receipt in receipts.items():
            n_taken += _take_shard(store, packed, number, receipt)
            progress.add(sum(entry.n_bytes for entry in receipt.entry.files.values()))
    return n_taken


def _receipts_of(store: MountedStore, plan: Plan) -> Mapping[int, Receipt]:
    """Those of shards of this very plan: they name no other file."""
    found = {}
    for number, (start, stop) in enumerate(plan.bounds):
        name = receipt_name(number)
        if store.size(name) < 0:
            continue
        try:
            value = json.loads(store.read(name))
            receipt = Receipt.from_json(JsonObject(value, "receipt"))
        except (DamagedSet, ValueError, RecursionError):  # that shard is made again
            continue
        names = {shard_file(field, number, True) for field in plan.fields}
        is_of_plan = receipt.codecs == plan.codecs and receipt.entry.files.keys() == names
        if is_of_plan and (receipt.entry.start, receipt.entry.stop) == (start, stop):
            found[number] = receipt
    return found


def _take_shard(store: MountedStore, packed: Path, number: int, receipt: Receipt) -> bool:
    try:
        for name, entry in receipt.entry.files.items():
            store.download(name, packed / name, entry)
    except IncompleteCopy as error:
        log(f"{error}: that shard is made again")
        return False
    write_receipt(LocalStore(packed), number, receipt)
    return True
