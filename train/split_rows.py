"""Which rows of a set a split has, and what is learnt from each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shards.dataset import ShardSet
from shards.errors import MissingSet
from shards.gather import RowGather
from shards.manifest import RIGHT_ROW
from shards.spec import NO_SCENE_TYPE, SPLITS, VOID
from train.joined import label_classes, parts_of_rows

MM_A_METRE = 1000


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is learnt from a row. `field`: where it is stored; None: in a column."""

    name: str
    field: str | None
    n_classes: int | None = None  # of semanticN


def target_of(name: str) -> Target:
    """ "scene", "semantic", "semanticN", "depth" or "instance"."""
    if name == "scene":
        return Target(name=name, field=None)
    if name.startswith("semantic"):
        n = name.removeprefix("semantic")
        return Target(name=name, field="label", n_classes=int(n) if n else None)
    return Target(name=name, field=name)


@dataclass(frozen=True, kw_only=True)
class StoredTarget:
    """A target as a set has it: what is stored of it, and how that becomes what is learnt.

    names: of the classes; none of a target that has no classes. Empty where the target is another:
    scene_ids: [rows of the set] int64, -1 = no class. label_classes: of each stored label, void is
    -100, torch's ignore_index; an array of each set that is joined.
    """

    target: Target
    names: tuple[str, ...] = ()
    scene_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    label_classes: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, found: ShardSet, target: Target, num_classes: int | None) -> "StoredTarget":
        """num_classes: which scene classes; None: the dataset's default. Raises MissingField where
        the set does not store the target, WrongSetting for other numbers of classes than it has,
        whatever the target.
        """
        if target.field:
            found.field(target.field)
        protocol = found.dataset.protocol(num_classes)
        if target.name == "scene":
            scene_ids = _ids_of_scenes(found, protocol.ids_of(found.dataset.scene_types))
            return cls(target=target, names=protocol.names, scene_ids=scene_ids)
        if target.field == "label":
            names, tables = label_classes(found, target.n_classes)
            classes = tuple(np.where(ids > 0, ids - 1, VOID) for ids in tables)
            return cls(target=target, names=names, label_classes=classes)
        return cls(target=target)

    def part(self, n: int, size: int) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of n rows of it in a batch of pictures of this size."""
        if self.target.name == "scene":
            return "i8", (n,)
        if self.target.name == "depth":
            return "f4", (n, 1, size, size)
        return "i8", (n, size, size)

    def fill(self, out: np.ndarray, rows: np.ndarray, found: ShardSet, gather: RowGather) -> None:
        """Write these rows of it to `out`, as `part` says: classes, metres, or ids as stored."""
        name = self.target.field
        if name is None:
            out[:] = self.scene_ids[rows]
            return
        stored = gather.into((name,), rows).view(found.field(name).dtype).reshape(out.shape)
        if name == "label":
            self._fill_label_classes(out, stored, found, rows)
        elif name == "depth":
            out[:] = stored / np.float32(MM_A_METRE)
        else:
            out[:] = stored

    def _fill_label_classes(
        self, out: np.ndarray, stored: np.ndarray, found: ShardSet, rows: np.ndarray
    ) -> None:
        """Stored ids of these rows -> classes; the ids mean what each row's own set says."""
        tables = self.label_classes
        if len(tables) == 1:
            out[:] = tables[0][stored]
            return
        part_of_row = parts_of_rows(found, rows)
        for part, table in enumerate(tables):
            is_of_part = part_of_row == part
            out[is_of_part] = table[stored[is_of_part]]


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """Which rows a dataset is of, and what is learnt from them.

    rows: [N] their numbers in the set. n_without_class: rows of the split that are left out, as
    their scene type is no class. targets: in their order. cameras: [rows of the set, 4], empty
    where nothing asks for it.
    """

    rows: np.ndarray
    n_without_class: int
    targets: tuple[StoredTarget, ...]
    cameras: np.ndarray


def read_split(
    found: ShardSet, split: str, targets: Sequence[str], num_classes: int | None = None
) -> SplitRows:
    """The rows of a split that have the targets; from the set's columns alone, without cameras.

    Raises MissingSet where there are none, and as `StoredTarget.of` does.
    """
    all_rows = rows = _rows_of_split(found, split)
    known = tuple(StoredTarget.of(found, target_of(name), num_classes) for name in targets)
    for each in known:
        if each.target.name == "scene":
            rows = all_rows[each.scene_ids[all_rows] >= 0]
    if len(all_rows) and not len(rows):
        what = f"has no {split} rows with a scene type"
        others = {"label": "the classes of pixels (semantic)", "depth": "depth"}
        there = [how for name, how in others.items() if name in found.manifest.fields]
        right = f"Learn something else of it: {' or '.join(there)}" if there else ""
        raise MissingSet(found.address, what, right)

    return SplitRows(
        rows=rows,
        n_without_class=len(all_rows) - len(rows),
        targets=known,
        cameras=np.empty((0, 4), np.float32),
    )


def _rows_of_split(found: ShardSet, split: str) -> np.ndarray:
    """Row numbers; rows that could not be read are in no split."""
    is_right = found.column("status") == RIGHT_ROW
    if split == "all":
        return np.flatnonzero(is_right)
    rows = np.flatnonzero(is_right & (found.column("split") == SPLITS.index(split)))
    if not len(rows):
        what = f"has no {split} rows"
        raise MissingSet(found.address, what, "Convert a source that has some")
    return rows


def _ids_of_scenes(found: ShardSet, id_of_type: np.ndarray) -> np.ndarray:
    """[rows of the set] int64; -1 = no class. id_of_type: of each of its scene types."""
    types = found.column("scene_type")
    has_type = types != NO_SCENE_TYPE
    ids = np.full(len(types), -1, np.int64)
    ids[has_type] = id_of_type[types[has_type]]
    return ids


def check_split(found: ShardSet, split: str) -> None:
    """Raise MissingSet that names the splits of a set where it has no row of this one."""
    n_rows = np.bincount(found.column("split"), minlength=len(SPLITS))
    has = [name for k, name in enumerate(SPLITS) if n_rows[k]]
    if split != "all" and split not in has:
        right = f"Choose {' or '.join(has)}, or convert a source that has some"
        raise MissingSet(found.address, f"has no {split} rows", right)


def evaluation_split(found: ShardSet, eval_split: str) -> str:
    """The split to score on: the one named; for "auto" val where there are such rows, else test.

    Raises MissingSet where it has neither.
    """
    if eval_split != "auto":
        check_split(found, eval_split)
        return eval_split
    split = found.column("split")
    is_right = found.column("status") == RIGHT_ROW
    for name in ("val", "test"):
        if np.any(is_right & (split == SPLITS.index(name))):
            return name
    raise MissingSet(
        found.address, "has neither val nor test rows", "Its source has to say which rows are"
    )
