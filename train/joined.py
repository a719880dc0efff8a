"""Several sets of one size as one: their rows behind each other, classes by name.

    set A  rows 0 .. 1448     ->  0 .. 1448
    set B  rows 0 .. 10334    ->  1449 .. 11783

Scene types, labels and places are put together by their names; a type or a label has the class that
the first set gives it which gives it one. A row that its set says to be the same picture as one of
another set here (a column `row_of_DATASET`) is left out: nothing is counted twice, nor on both
sides of a split.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from shards.dataset import ShardSet
from shards.errors import DifferentSets, WrongSetting
from shards.files import log
from shards.gather import JoinedShards, RowGather
from shards.manifest import FAILED_ROW, RIGHT_ROW, Column, Manifest
from shards.spec import (
    NO_SCENE_TYPE,
    DatasetSpec,
    Field,
    LabelTable,
    SceneProtocol,
    SourceIdentity,
    Statistics,
)
from shards.texts import Texts
from stores.cached_set import CachedGather, CachedSet

SAME_ROW = "row_of_"  # and the name of a dataset: a column of rows of that one
NO_ROW = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class NamedProtocol(SceneProtocol):
    """A scene protocol of several datasets. class_of: of each scene type that has a class."""

    class_of: Mapping[str, str] = field(default_factory=dict)

    def ids_of(self, scene_types: Sequence[str]) -> np.ndarray:
        """[T] int64: the class of each type; -1 = left out."""
        number_of = {name: k for k, name in enumerate(self.classes)}
        ids = [number_of.get(self.class_of.get(name, ""), -1) for name in scene_types]
        return np.array(ids, np.int64)


@dataclass(frozen=True, kw_only=True)
class SameRows:
    """Rows of a part, by their numbers in it, that are pictures of right rows of another one."""

    part: int
    rows: np.ndarray
    other: Path


@dataclass(frozen=True)
class JoinedSet(ShardSet):
    """Sets that are read as one. parts: these, in the order of their rows."""

    parts: tuple[ShardSet, ...] = ()

    @cached_property
    def first_rows(self) -> np.ndarray:
        """[parts + 1] where the rows of each begin."""
        return np.cumsum([0, *(part.n_rows for part in self.parts)])

    def column(self, name: str) -> np.ndarray:
        """One value a row [N, ...], numbers of places and scene types as here; see ShardSet."""
        values = [part.column(name) for part in self.parts]
        if name == "scene":
            values = [self._places(*each) for each in zip(self.parts, values, strict=True)]
        if name == "scene_type":
            values = [self._types(*each) for each in zip(self.parts, values, strict=True)]
        joined = np.concatenate(values)
        if name == "status":
            for same in self._same_rows:
                joined[self.first_rows[same.part] + same.rows] = FAILED_ROW
        return joined

    def texts(self, name: str) -> Texts:
        """Of all sets, behind each other; see ShardSet."""
        texts = [part.texts(name) for part in self.parts]
        lengths = np.concatenate([each.lengths for each in texts])
        return Texts.from_lengths(lengths, np.concatenate([each.utf8 for each in texts]))

    def shards(self, field: str) -> Sequence[np.ndarray]:
        """Of all sets, behind each other; see ShardSet."""
        return JoinedShards([part.shards(field) for part in self.parts], self.first_rows)

    def maps(self, fields: Iterable[str]) -> dict[str, Sequence[np.ndarray]]:
        """Of several fields, to be read together; see ShardSet."""
        names = [self.field(name).name for name in fields]
        of_parts = [part.maps(names) for part in self.parts]
        found: dict[str, Sequence[np.ndarray]] = {}
        for name in names:
            found[name] = JoinedShards([maps[name] for maps in of_parts], self.first_rows)
        return found

    def gather(self, fields: Sequence[str]) -> RowGather:
        """What takes many rows of several fields at once; see ShardSet."""
        if any(isinstance(part, CachedSet) for part in self.parts):
            return CachedGather(self, fields)
        return super().gather(fields)

    def row(self, field: str, row: int) -> np.ndarray:
        """One row of a field; see StoredSet."""
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return self.parts[number].row(field, row - int(self.first_rows[number]))

    def are_here(self, rows: np.ndarray) -> np.ndarray:
        """[B] whether these rows [B] are on this machine; see ShardSet."""
        found = np.empty(len(rows), bool)
        of_parts = parts_of_rows(self, rows)
        for number, part in enumerate(self.parts):
            is_of_part = of_parts == number
            found[is_of_part] = part.are_here(rows[is_of_part] - self.first_rows[number])
        return found

    def wait_for(self, rows: np.ndarray) -> None:
        """Return once these rows [B] are on this machine; see ShardSet."""
        of_parts = parts_of_rows(self, rows)
        for number, part in enumerate(self.parts):
            part.wait_for(rows[of_parts == number] - self.first_rows[number])

    def _places(self, part: ShardSet, places: np.ndarray) -> np.ndarray:
        number_of = {name: k for k, name in enumerate(self.manifest.scenes)}
        numbers = [number_of[name] for name in part.manifest.scenes]
        return np.array(numbers, places.dtype)[places]

    def _types(self, part: ShardSet, types: np.ndarray) -> np.ndarray:
        number_of = {name: k for k, name in enumerate(self.dataset.scene_types)}
        numbers = [number_of[name] for name in part.dataset.scene_types]
        found = np.full(len(types), NO_SCENE_TYPE, types.dtype)
        is_known = types != NO_SCENE_TYPE
        found[is_known] = np.array(numbers, types.dtype)[types[is_known]]
        return found

    @cached_property
    def _same_rows(self) -> list[SameRows]:
        """What is left out."""
        numbered = list(enumerate(self.parts))
        found = [
            SameRows(part=k, rows=_rows_that_are_in(part, other), other=other.path)
            for k, part in numbered
            for other in self.parts
        ]
        return [same for same in found if len(same.rows)]

    def say_what_is_left_out(self) -> None:
        """A line of each set that holds pictures of another one."""
        for same in self._same_rows:
            path = self.parts[same.part].path
            log(f"{path}: {len(same.rows)} rows are pictures of {same.other}: left out")

    def label_classes(
        self, n_classes: int | None
    ) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
        """See the function `label_classes`. Raises WrongSetting where the sets have others by the
        same number, too.
        """
        if n_classes == len(self.dataset.label_names):
            n_classes = None
        tables = [part.dataset.label_table(n_classes) for part in self.parts]
        names = _by_name(table.names for table in tables)
        if n_classes is not None and len(names) != n_classes:
            target = f"semantic{n_classes}"
            raise WrongSetting("target", target, f"the sets have {len(names)} classes by name")
        number_of = {name: k + 1 for k, name in enumerate(names)}
        ids = []
        for table in tables:
            of_class = np.array([0, *(number_of[name] for name in table.names)])
            ids.append(of_class[np.array(table.ids)])
        return names, tuple(ids)


def parts_of(found: ShardSet) -> tuple[ShardSet, ...]:
    """The sets that are joined in one; a set itself."""
    return found.parts if isinstance(found, JoinedSet) else (found,)


def parts_of_rows(found: ShardSet, rows: np.ndarray) -> np.ndarray:
    """[B] of which of `parts_of` each of these rows [B] is."""
    if not isinstance(found, JoinedSet):
        return np.zeros(len(rows), np.int64)
    return np.searchsorted(found.first_rows, rows, side="right") - 1


def label_classes(
    found: ShardSet, n_classes: int | None
) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
    """Names of the pixels' classes, and of each set that is joined the class of each stored id.

    Classes count from 1; 0 = void. n_classes: None: every label by itself. Raises WrongSetting.
    """
    if isinstance(found, JoinedSet):
        return found.label_classes(n_classes)
    table = found.dataset.label_table(n_classes)
    return table.names, (np.array(table.ids, np.int64),)


def join(parts: Sequence[ShardSet]) -> JoinedSet:
    """Sets as one, with the fields that all of them have.

    Raises DifferentSets where their sizes or the kinds of a field differ.
    """
    for other in parts[1:]:
        _check_alike(parts[0], other)
    names = [name for name in parts[0].manifest.fields if all(_has(part, name) for part in parts)]
    fields = {name: _joined_field([part.field(name) for part in parts]) for name in names}
    geometries = [_geometry(part) for part in parts]
    is_one_geometry = all(each == geometries[0] for each in geometries)
    crop = parts[0].settings.crop if is_one_geometry else "none"
    manifest = Manifest(
        dataset=_joined_spec([part.dataset for part in parts], is_one_geometry),
        source=_joined_source(parts),
        settings=replace(parts[0].settings, fields=tuple(names), crop=crop),
        n_rows=sum(part.n_rows for part in parts),
        fields=fields,
        shards=[],
        scenes=_by_name(part.manifest.scenes for part in parts),
        columns=_columns_of_all(parts),
    )
    path = Path(" and ".join(str(part.path) for part in parts))
    return JoinedSet(path, manifest, tuple(parts))


def _has(part: ShardSet, field: str) -> bool:
    return field in part.manifest.fields


def _by_name(lists: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """All names, each once, in the order in which they come."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _check_alike(first: ShardSet, other: ShardSet) -> None:
    """Raise DifferentSets unless their rows can lie in one batch."""
    sizes = first.settings.size, other.settings.size
    if sizes[0] != sizes[1]:
        raise DifferentSets(first.path, other.path, "size", *sizes)
    for name, ours in first.manifest.fields.items():
        theirs = other.manifest.fields.get(name, ours)
        if (theirs.kind, theirs.dtype) != (ours.kind, ours.dtype):
            found = (f"{each.kind} ({each.dtype})" for each in (ours, theirs))
            raise DifferentSets(first.path, other.path, f"field {name}", *found)
    if first.manifest.fingerprint == other.manifest.fingerprint:
        raise WrongSetting("data", other.path, f"it is the same set as {first.path}")


# ---------------------------------------------------------------- what a joined manifest says


def _joined_field(fields: Sequence[Field]) -> Field:
    """The first one, with the statistics of all train rows together."""
    known = [each.statistics for each in fields if each.statistics is not None]
    if len(known) < len(fields):
        return replace(fields[0], statistics=None)
    count = np.array([each.count for each in known], np.float64)
    mean = np.array([each.mean for each in known])
    std = np.array([each.std for each in known])

    share = count / count.sum(axis=0)
    mean_of_all = (share * mean).sum(axis=0)
    square_of_all = (share * (std**2 + mean**2)).sum(axis=0)
    std_of_all = np.sqrt(np.maximum(square_of_all - mean_of_all**2, 0))
    statistics = Statistics(
        count=tuple(int(n) for n in count.sum(axis=0)),
        mean=tuple(mean_of_all.tolist()),
        std=tuple(std_of_all.tolist()),
    )
    return replace(fields[0], statistics=statistics)


def _joined_source(parts: Sequence[ShardSet]) -> SourceIdentity:
    """Whose fingerprint is another one for other sets, and for another order of them."""
    fingerprints = " ".join(part.manifest.fingerprint for part in parts)
    return SourceIdentity(
        kind="sets",
        name=" and ".join(part.path.name for part in parts),
        n_bytes=0,
        sha256=hashlib.sha256(fingerprints.encode()).hexdigest(),
    )


def _columns_of_all(parts: Sequence[ShardSet]) -> dict[str, Column]:
    columns = parts[0].manifest.columns
    others = [part.manifest.columns for part in parts[1:]]
    return {
        name: column
        for name, column in columns.items()
        if all(other.get(name) == column for other in others)
    }


def _joined_spec(specs: Sequence[DatasetSpec], is_one_geometry: bool) -> DatasetSpec:
    spec = DatasetSpec(name="joined", width=0, height=0)  # as pictures of several sizes are
    if is_one_geometry:
        spec = replace(specs[0], name="joined")
    default = _joined_protocol([each.protocol(None) for each in specs], specs)
    numbers = _by_number(each for spec in specs for each in spec.protocols)
    protocols = [
        _joined_protocol([_of_dataset(each, spec) for spec in specs], specs)
        for each in numbers.values()
    ]
    label_names = _by_name(each.label_names for each in specs)
    return replace(
        spec,
        scene_types=_by_name(each.scene_types for each in specs),
        # Of two with as many classes the last one is taken.
        protocols=(*protocols, default),
        default_n_classes=len(default.names) or None,
        label_names=label_names,
        label_tables=_common_tables(specs),
        warnings=_by_name(each.warnings for each in specs),
    )


def _geometry(part: ShardSet) -> tuple[object, ...]:
    """What is stored of a picture, and by which camera it was taken."""
    spec = part.dataset
    crop = part.settings.crop
    return spec.width, spec.height, spec.crops, spec.depth_crop, spec.camera, crop


def _by_number(protocols: Iterable[SceneProtocol]) -> dict[int, SceneProtocol]:
    """By how many classes they have; of several the first."""
    found: dict[int, SceneProtocol] = {}
    for each in protocols:
        found.setdefault(len(each.names), each)
    return found


def _of_dataset(protocol: SceneProtocol, spec: DatasetSpec) -> SceneProtocol:
    """For another dataset than its own: the rest of that one's types is left out."""
    return protocol if protocol in spec.protocols else replace(protocol, others=None)


def _joined_protocol(
    protocols: Sequence[SceneProtocol], specs: Sequence[DatasetSpec]
) -> NamedProtocol:
    """The classes of all, one protocol a dataset. A type has the class that the first of them gives
    it which gives it one by its own name, else the first that gives it one.
    """
    class_of: dict[str, str] = {}
    for by_its_name in (True, False):
        for protocol, spec in zip(protocols, specs, strict=True):
            ids = protocol.ids_of(spec.scene_types)
            for name, number in zip(spec.scene_types, ids.tolist(), strict=True):
                if number < 0 or (by_its_name and protocol.names[number] != name):
                    continue
                class_of.setdefault(name, protocol.names[number])
    return NamedProtocol(classes=_by_name(each.names for each in protocols), class_of=class_of)


def _common_tables(specs: Sequence[DatasetSpec]) -> tuple[LabelTable, ...]:
    """The groupings that every dataset has by the same names. Which ids they group is not said:
    see `JoinedSet.label_classes`.
    """
    others = [{frozenset(table.names) for table in spec.label_tables} for spec in specs[1:]]
    return tuple(
        LabelTable(names=table.names, ids=())
        for table in specs[0].label_tables
        if all(frozenset(table.names) in other for other in others)
    )


# ---------------------------------------------------------------- the same picture twice


def _rows_that_are_in(part: ShardSet, other: ShardSet) -> np.ndarray:
    """Rows of `part` that it says to be rows of `other`'s dataset, which `other` has."""
    name = f"{SAME_ROW}{other.dataset.name}"
    if name not in part.manifest.columns:
        return np.empty(0, np.int64)
    row_there = part.column(name)
    right_there = other.column("row")[other.column("status") == RIGHT_ROW]
    is_same = (row_there != NO_ROW) & np.isin(row_there, right_there)
    return np.flatnonzero(is_same & (part.column("status") == RIGHT_ROW))
