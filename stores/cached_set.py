"""A set of which a cache holds some shards, read as a set is: by maps, as far as they are there.

A shard that a cache lets go is unmapped, so that its space on the disk is free, once nobody in this
process reads. That is the one exception to what shards/maps.py says; `CachedGather` sees to it:

    a read begins   once all its shards are there; the first of those under way: shards that have
                    gone since are unmapped
    a read ends     nothing
    now and then    a thread does the same as a read that begins: who has nothing to read for long
                    keeps no space either

Rows of shards that are not there, and will not come by themselves, are read one by one from where
the set lies.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from weakref import ref

import numpy as np

from shards.containers import fetch_row
from shards.dataset import ShardSet
from shards.errors import DamagedSet
from shards.files import Folder, LocalFolder
from shards.gather import JoinedShards, RowGather
from shards.manifest import address, read_manifest
from shards.maps import AddressRange, FieldFiles, MappedShards, mapped_shards
from stores.cache import (
    COMES,
    NOT_COMING,
    PASSES,
    SERVED,
    STATE,
    CacheState,
    NobodyReads,
    failure,
)

ROWS_AT_ONCE = 8  # that are asked for at the same time
FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.05
PATIENCE_S = 30.0  # for shards that come when others are some batches on
LOOK_S = 0.5  # how often who waits looks whether it waits in vain
UNMAP_S = 0.25


class NotAtHand(Exception):
    """Rows of shards that are not there and will not come by themselves."""


@dataclass(frozen=True, kw_only=True)
class CachedAddress:
    """How a cached set is opened again in another process. feed: see CachedSet."""

    path: Path
    source: Folder
    feed: int

    def opened(self) -> "CachedSet":
        return CachedSet(self.path, read_manifest(self.path), self.source, self.feed)


@dataclass(frozen=True)
class CachedSet(ShardSet):
    """See the module. path: the cache's folder. source: where the set lies.

    feed: the number of who has shards fetched for this process; 0: nobody, so that what is not
    there is not waited for.
    """

    source: Folder
    feed: int = 0

    @property
    def address(self) -> Path | str:
        return address(self.source)

    @property
    def reopened(self) -> CachedAddress:
        return CachedAddress(path=self.path, source=self.source, feed=self.feed)

    @cached_property
    def state(self) -> CacheState:
        """What of it is there."""
        return CacheState(self.path / STATE, self.n_shards)

    def maps(self, fields: Iterable[str]) -> dict[str, Sequence[np.ndarray]]:
        """The shards of several fields; who reads them uses a CachedGather. Raises MissingField."""
        named = [self.field(name) for name in fields]
        made = partial(CachedShards, state=self.state, feed=self.feed)
        return dict(mapped_shards(self.path, self.manifest, named, made))

    def gather(self, fields: Sequence[str]) -> RowGather:
        """What takes many rows of several fields at once. Raises as `maps`."""
        return CachedGather(self, fields)

    def row(self, field: str, row: int) -> np.ndarray:
        """One row, if need be from where the set lies; no more of it is fetched."""
        shard, place = divmod(row, self.settings.rows_per_shard)
        wanted = self.manifest, self.field(field), shard, place
        try:
            return fetch_row(LocalFolder(self.path), *wanted)
        except DamagedSet:  # it is not here
            return fetch_row(self.source, *wanted)

    def are_here(self, rows: np.ndarray) -> np.ndarray:
        """[B] whether these rows [B] are, without waiting for any."""
        return self.state.is_here(rows // self.settings.rows_per_shard)

    def wait_for(self, rows: np.ndarray) -> None:
        """Return once these rows [B] are there. Raises as Waiting does."""
        shards = np.unique(rows // self.settings.rows_per_shard)
        Waiting(self.path, self.state, self.feed).wait_for(shards)


class Waiting:
    """Waits for shards that are on their way."""

    def __init__(self, path: Path, state: CacheState, feed: int) -> None:
        """path: the cache's folder."""
        self.state = state
        self._path = path
        self._feed = feed

    def wait_for(self, shards: np.ndarray) -> None:
        """Return once these shards [n] are there.

        Raises NotAtHand where they will not come, StoreFailed where fetching has failed,
        RuntimeError where nobody waits for this thread any more.
        """
        if self.state.is_here(shards).all():
            return
        if not self._feed:
            raise NotAtHand
        n_passes = int(self.state.numbers[PASSES])
        pause_s = FIRST_PAUSE_S
        parent = os.getppid()
        began_at = time.monotonic()
        looked_at = -LOOK_S
        while not self._have_come(shards, n_passes, time.monotonic() - began_at > PATIENCE_S):
            if time.monotonic() - looked_at > LOOK_S:
                looked_at = time.monotonic()
                self._look_for_failure()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if _is_to_end() or os.getppid() != parent:
                raise RuntimeError("a batch was waited for that nobody wants any more")

    def _have_come(self, shards: np.ndarray, n_passes: int, is_impatient: bool) -> bool:
        """n_passes: of who fetches, when it was begun to wait: one that was under way then may not
        have seen what is wanted. Raises NotAtHand.
        """
        is_served = self._feed == int(self.state.numbers[SERVED])
        was_seen = is_served and int(self.state.numbers[PASSES]) >= n_passes + 2
        coming = self.state.coming[shards].copy()
        is_here = self.state.is_here(shards)  # after it: what has come need not be coming any more
        comes = coming == COMES if is_impatient else coming != NOT_COMING
        if was_seen and not (is_here | comes).all():
            raise NotAtHand
        return bool(is_here.all())

    def _look_for_failure(self) -> None:
        """Raises it; NotAtHand where the loaders are gone that had shards fetched."""
        try:
            found = failure(self._path, self._feed)
        except NobodyReads:
            raise NotAtHand from None
        if found is not None:
            raise found


def _is_to_end() -> bool:
    """Whether this thread is waited for by who ends it, or Python ends."""
    is_ended = getattr(threading.current_thread(), "is_to_end", False)
    return is_ended or not threading.main_thread().is_alive()


class CachedShards(MappedShards):
    """The shards of one field that come and go."""

    def __init__(
        self,
        files: FieldFiles,
        addresses: AddressRange,
        first: int,
        *,
        state: CacheState,
        feed: int,
    ) -> None:
        """feed: of who has shards fetched; the state is that of whose orders are served."""
        super().__init__(files, addresses, first)
        self._state = state
        self._feed = feed
        self._seen = np.zeros(len(files.names), np.uint32)  # state.changes when it was mapped

    def need(self, shards: np.ndarray) -> None:
        """Have these shards mapped. Raises NotAtHand where one is not there."""
        wanted = shards[~self._is_mapped[shards]]
        if len(wanted):
            if not self._state.is_here(wanted).all():
                raise NotAtHand
            super().need(wanted)

    def unmap_gone(self) -> None:
        """Unmap what was removed since it was mapped. Nobody may be reading."""
        changes = self._state.changes
        is_gone = self._is_mapped & ((self._seen != changes) | (changes % 2 == 0))
        if is_gone.any():
            self.unmap(np.flatnonzero(is_gone))

    def _map(self, shard: int) -> None:
        seen = self._state.changes[shard]
        if self._is_mapped[shard] and seen != self._seen[shard]:
            return  # it is gone, and stays readable until it is unmapped
        try:
            super()._map(shard)
        except DamagedSet:
            is_served = self._feed != 0 and self._feed == int(self._state.numbers[SERVED])
            if is_served and seen == self._state.changes[shard] and seen % 2:
                raise
            raise NotAtHand from None  # it was removed just now, long ago, or other fields came
        self._seen[shard] = seen


class CachedGather(RowGather):
    """Rows of shards that come and go: see the module."""

    def __init__(self, found: ShardSet, fields: Sequence[str]) -> None:
        """found: a cached set, or several sets of which some are."""
        shards = found.maps(fields)
        super().__init__(shards, found.settings.size)
        self._found = found
        self._cached = cached_in(shards)
        self._under_way = UnderWay(self._unmap_gone)
        self._is_seen_to_by = 0  # the process whose thread unmaps

    def into(
        self, fields: Sequence[str], rows: np.ndarray, buffer: memoryview | None = None
    ) -> np.ndarray:
        """See RowGather. Raises StoreFailed where rows cannot be had."""
        self._see_to_unmapping()
        try:
            self._found.wait_for(rows)  # no read yet: what goes meanwhile can be unmapped
            with self._under_way:
                return super().into(fields, rows, buffer)
        except NotAtHand:
            return self._row_by_row(fields, rows, buffer)

    def at_hand(self, rows: np.ndarray) -> np.ndarray:
        """Those of these rows that are not waited for."""
        return rows[self._found.are_here(rows)]

    def expect_no_order(self, fields: Sequence[str], rows: np.ndarray) -> None:
        """See RowGather; of what was removed meanwhile nothing is expected."""
        with suppress(NotAtHand), self._under_way:
            super().expect_no_order(fields, rows)

    def row_spans(self, fields: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See RowGather; of none where some were removed meanwhile."""
        try:
            with self._under_way:
                return super().row_spans(fields, rows)
        except NotAtHand:
            return np.empty(0, np.int64), np.empty(0, np.int64)

    def _row_by_row(
        self, fields: Sequence[str], rows: np.ndarray, buffer: memoryview | None
    ) -> np.ndarray:
        """The same bytes as `into`, each row asked for by itself."""
        wanted = [(field, row) for field in self.widest_first(fields) for row in rows.tolist()]
        with ThreadPoolExecutor(ROWS_AT_ONCE) as pool:
            found = pool.map(lambda each: self._found.row(*each).tobytes(), wanted)
            data = np.frombuffer(b"".join(found), np.uint8)
        if buffer is None:
            return data.copy()
        out = np.frombuffer(buffer, np.uint8, len(data))
        out[:] = data
        return out

    def _unmap_gone(self) -> None:
        for each in self._cached:
            each.unmap_gone()

    def unmap_if_idle(self) -> None:
        """Unmap what has gone, unless somebody reads: then that is done soon."""
        with self._under_way:
            pass

    def _see_to_unmapping(self) -> None:
        """A forked child has no thread of its parent's."""
        if self._is_seen_to_by != os.getpid():
            self._is_seen_to_by = os.getpid()
            threading.Thread(
                target=_unmap_now_and_then, args=(ref(self),), name="unmapping", daemon=True
            ).start()


def _unmap_now_and_then(of: "ref[CachedGather]") -> None:
    """As long as the gather lives."""
    while (gather := of()) is not None:
        gather.unmap_if_idle()
        del gather
        time.sleep(UNMAP_S)


def cached_in(shards: Mapping[str, Sequence[np.ndarray]]) -> list[CachedShards]:
    """Those that come and go, of all fields and all joined sets."""
    found: list[CachedShards] = []
    for each in shards.values():
        parts = each.parts if isinstance(each, JoinedShards) else [each]
        found += [part for part in parts if isinstance(part, CachedShards)]
    return found


class UnderWay:
    """The reads under way in this process; before the first of them something is done."""

    def __init__(self, before_the_first: Callable[[], None]) -> None:
        self._before_the_first = before_the_first
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._n_reads = 0

    def __enter__(self) -> None:
        if self._owner != os.getpid():  # forked: what was under way is the parent's
            self._begin_anew()
        with self._lock:
            if self._n_reads == 0:
                self._before_the_first()
            self._n_reads += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._n_reads -= 1
