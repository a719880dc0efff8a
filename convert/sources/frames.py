"""Any RGB-D source as a table of frames: a line a row, with the paths of its pictures.

FrameTable  lines as written  ->  splits, order  ->  FrameRows  rows as they will be stored
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.resize import as_meant
from convert.sources.base import RowFacts, RowReader
from convert.sources.dealing import FEWEST_PLACES, IN_ORDER, SplitRule, dealt_order
from convert.sources.depth_encodings import DepthRule, check_names, looks_undecoded
from convert.sources.errors import BadRow
from convert.sources.frame_rows import DepthRules, FrameRows, FramesReader, LabelRule
from convert.sources.layouts import LAYOUTS, is_laid_out, layout_of
from convert.sources.listings import Listing, Wanted
from convert.sources.opening import SourceOptions
from convert.sources.pictures import decoder_name
from convert.sources.roots import Roots
from convert.sources.tables import NONE, FrameTable, Names, read_table
from shards.errors import ChangedSource, WrongSetting, WrongSource
from shards.files import log
from shards.spec import (
    DEALT,
    EXIF,
    KNOWN_FIELDS,
    MAX_ID,
    NAME,
    NO_SCENE_TYPE,
    SPLITS,
    ConversionSettings,
    DatasetSpec,
    Field,
    SourceIdentity,
    field_of_kind,
)

NOTHING_KNOWN = DatasetSpec(name="", width=0, height=0)
PROBED_ROWS = 8  # read before a conversion begins
MAX_SCENE_TYPES = 4096


class FramesSource:
    """A table of frames, or a directory of a known layout, opened. See convert.sources.base.Source.

    path: of the table or directory. settings: those that the conversion will have; what they leave
    open is settled here. Raises WrongSource for a table that cannot be read, WrongSetting for
    settings that do not fit it.
    """

    def __init__(self, path: Path, settings: ConversionSettings, options: SourceOptions) -> None:
        check_names(settings.depth_encoding, settings.depth_scale, settings.depth_trunc)
        self._path = path
        # For other processes, which may have another current folder.
        self.opener = partial(type(self), path.absolute(), settings, options.from_anywhere())
        self._wanted = Wanted(kinds=settings.kinds, known=settings.fields, roots=options.roots)
        self._is_laid_out = is_laid_out(path, options.layout)
        self._layout = layout_of(path, options.layout) if self._is_laid_out else ""
        listing = self._read(settings)
        table = listing.table
        spec = listing.spec or NOTHING_KNOWN
        self._stamp_when_read = listing.stamp
        self._identity = SourceIdentity(
            kind="table", name=path.name, n_bytes=table.n_bytes, sha256=table.sha256
        )
        self.n_rows = table.n_rows
        self.fields: Mapping[str, Field] = _fields_of(table, settings)

        self._places = _places_of(table)
        rule = _split_rule(table, self._places, settings)
        self._split_by = None if rule is None else str(rule)
        split = _split_of(table, self._places, rule)
        lines = dealt_order(split)
        self._facts = _facts_of(table, self._places, split, lines, spec.scene_types)
        self._own_columns = {name: each[lines] for name, each in listing.own_columns.items()}
        paths = dict(table.paths)
        table = replace(table, paths={})  # a million paths are held once
        self._rows = FrameRows(paths, table.columns, lines)
        if options.label_names is not None:
            label_names = _label_names(options.label_names)
            spec = replace(spec, label_names=label_names, label_tables=())
        self.dataset = replace(
            spec,
            name=_dataset_name(path, options.name or spec.name or None),
            scene_types=self._facts.scene_types,
            warnings=(*spec.warnings, *_warnings(table, self._places, split)),
        )

        folder = path if path.is_dir() else path.parent
        roots = options.roots or listing.roots
        self._roots = Roots(folder, roots, options.follow, listing.opened)
        self._depth_rules = DepthRules.of(self._rows, settings)
        self._label_rule = LabelRule(void=settings.label_void)
        self.handles: tuple[int, ...] | None = (self._rows.arrays.handle,)
        self.may_hang = self._roots.may_hang
        self.rows_differ = True
        self.advice = "Read the disk and the file again"
        self.decoder: str | None = decoder_name()
        for warning in self.dataset.warnings:
            log(f"{path}: {warning}")
        try:
            self._row_bytes = self._probe(settings)
        except BaseException:
            self.close()
            raise

    def _read(self, settings: ConversionSettings) -> Listing:
        """The table, or what the directory's layout makes one of, with its stamp as it was read."""
        if self._is_laid_out:
            listing = self._listing()
            for note in listing.notes:
                log(f"{self._path}: {note}")
            return replace(listing, table=_with_encoding_given(listing.table, settings))
        stamp = self.stamp() if self._path.exists() else ()  # what is absent, `read_table` says
        by = SplitRule.parse(settings.split_by).by if settings.split_by else "scene"
        also = [by] if by not in ("scene", "row") else []
        table = read_table(self._path, fields=self._wanted.kinds, also=also)
        if table.not_used:
            log(f"{self._path}: not used: {', '.join(table.not_used)}")
        return Listing(table=table, stamp=stamp)

    def _listing(self) -> Listing:
        return LAYOUTS[self._layout].read(self._path, self._wanted)

    def __str__(self) -> str:
        return str(self._path)

    def close(self) -> None:
        self._roots.close()
        self._rows.arrays.close()

    # ------------------------------------------------------------------ what it is

    def resolved(self, settings: ConversionSettings) -> ConversionSettings:
        """Those given, with the split rule, the order and the orientation that count here."""
        chosen = settings.of_source(list(self.fields.values()), self.n_rows)
        return replace(
            chosen,
            axes="auto",
            split_by=self._split_by,
            orientation=EXIF,
            order_version=DEALT,
        )

    def identity(self) -> SourceIdentity:
        """Of the table as it was read; whether it changed since is the stamp's to tell."""
        return self._identity

    def stamp(self) -> tuple[int, ...]:
        if self._is_laid_out:
            stamp = LAYOUTS[self._layout].stamp
            return stamp(self._path, self._wanted) if stamp else self._listing().stamp
        stat = self._path.stat()
        # What was made of it before stays right whenever it is written again: all that it says is
        # part of its identity.
        always = 0
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, always

    def row_facts(self) -> RowFacts:
        """Raises ChangedSource where it changed since it was opened: its lines were read then."""
        if self.stamp() != self._stamp_when_read:
            raise ChangedSource(self, "changed while it was read", "Wait until it is whole")
        columns: dict[str, Any] = {
            "split": self._facts.split,
            "scene": self._facts.scene,
            "scene_type": self._facts.scene_type,
            "row": self._rows.lines,
            "rgb_file": self._rows.paths("rgb"),
        }
        if "depth" in self._rows.fields:
            columns["depth_file"] = self._rows.paths("depth")
        return RowFacts(
            columns=columns | self._own_columns,
            scenes=self._places.names,
            dataset=self.dataset,
            camera_px=self._facts.camera_px,
        )

    def highest_id(self, field: str) -> int | None:
        """None: names decide no stored byte. Labels beyond them are called by their numbers."""
        return None

    def check_crop(self, crop: str) -> None:
        if crop != "none":
            raise WrongSetting("crop", crop, "pictures of a table have no box in common")

    def readers(self, fields: Sequence[str]) -> Sequence[RowReader]:
        reader = self._reader(fields)
        reader.row_bytes = self._row_bytes
        return [reader]

    def _reader(self, fields: Sequence[str]) -> FramesReader:
        return FramesReader(
            [self.fields[name] for name in fields],
            self._rows,
            self._roots,
            self._depth_rules,
            self._label_rule,
        )

    # ------------------------------------------------------------------ a few rows, beforehand

    def _probe(self, settings: ConversionSettings) -> int:
        """Read a few rows: bytes of a decoded one. Says what depth a median pixel is.

        Raises WrongSource where none can be read, WrongSetting for depth that looks undecoded.
        """
        asked = (*settings.fields, *settings.kinds)
        fields = [field for name, field in self.fields.items() if name in asked]
        reader = self._reader([field.name for field in fields])
        n_probed = min(PROBED_ROWS, self.n_rows)
        rows = np.unique(np.linspace(0, self.n_rows - 1, n_probed).astype(int)).tolist()
        problems: list[str] = []
        row_bytes = 0
        highest_label = 0
        for row in rows:
            try:
                pictures = reader.read_group(row)
                row_bytes = max(row_bytes, sum(each[0].nbytes for each in pictures.values()))
                for label in pictures.get("label", ()):
                    highest_label = max(highest_label, int(as_meant(label).max()))
            except BadRow as error:
                problems.append(str(error))
        for field in fields:
            if field.kind == "depth":
                self._probe_depth(reader, field.name, rows, settings)
        self._check_names(highest_label)
        if len(problems) == len(rows):
            what = f"has no row that can be read, of {len(rows)} tried: {problems[0]}"
            raise WrongSource(self, what, "Check where its paths lead")
        return row_bytes

    def _check_names(self, highest_label: int) -> None:
        """Raise WrongSetting for a label without a name: mostly a void that was not named."""
        n_names = len(self.dataset.label_names)
        if n_names and highest_label > n_names:
            label = highest_label - 1 if self._label_rule.void else highest_label
            what = f"{self} has the label {label}, beyond the {n_names} names"
            void = self._label_rule.void
            raise WrongSetting(
                "label_void", void, f"{what}. Add its name, or say that it is the void"
            )

    def _probe_depth(
        self, reader: FramesReader, field: str, rows: Sequence[int], settings: ConversionSettings
    ) -> None:
        planes: dict[int, np.ndarray] = {}
        for row in rows:
            try:
                stored = reader.stored_depth(field, row)
            except BadRow:
                continue  # told when its turn comes
            if stored is not None:
                planes[row] = stored
        if not planes:
            return
        named = settings.depth_encoding is not None or settings.depth_scale is not None
        unnamed = [planes[row] for row in planes if self._rows.encoding_of(row) is None]
        looks_like = None if named or not unnamed else looks_undecoded(unnamed)
        if looks_like is not None:
            what = f"left at its default, but {field} of {self} looks like {looks_like}"
            raise WrongSetting(
                "depth_encoding", "mm", f"{what}. Choose that, or mm if it is not so"
            )
        row = list(planes)[len(planes) // 2]
        self._say_median(field, planes[row], self._depth_rules.of_row(self._rows, row))

    def _say_median(self, field: str, stored_hw: np.ndarray, rule: DepthRule) -> None:
        """What a median pixel becomes: a wrong unit shows at once."""
        is_measured = np.isfinite(stored_hw) & (stored_hw > 0)
        if not is_measured.any():
            return
        try:
            mm = rule.to_mm(stored_hw)
        except BadRow:
            return
        median = np.median(stored_hw[is_measured])
        metres = np.median(mm[mm > 0]) / 1000 if (mm > 0).any() else 0
        log(f"{self}: a median pixel of {field} is {median:g} in its file, {metres:.3f} m here")


# ---------------------------------------------------------------- what a table says of its rows


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """Columns in the order of the set."""

    split: np.ndarray
    scene: np.ndarray
    scene_type: np.ndarray
    scene_types: tuple[str, ...]
    camera_px: np.ndarray | None


def _with_encoding_given(table: FrameTable, settings: ConversionSettings) -> FrameTable:
    """What a user says of the depths of a directory counts, and not what its layout says."""
    if settings.depth_encoding is None and settings.depth_scale is None:
        return table
    columns = {name: each for name, each in table.columns.items() if name != "depth_encoding"}
    return replace(table, columns=columns)


def _fields_of(table: FrameTable, settings: ConversionSettings) -> dict[str, Field]:
    """Raises WrongSetting for a kind of field that cannot be."""
    fields = {name: KNOWN_FIELDS[name] for name in KNOWN_FIELDS if name in table.paths}
    for name in table.paths:
        if name not in KNOWN_FIELDS:
            fields[name] = field_of_kind(name, settings.kinds[name])
    return fields


def _places_of(table: FrameTable) -> Names:
    """The place of each line: its scene, else the folder of its rgb. Every line has one."""
    scene = table.columns.get("scene")
    if scene is None:
        return _folders_of(table)
    numbers = scene.numbers
    if not np.any(numbers == NONE):
        return scene
    names = (*scene.names, "")
    return Names(numbers=np.where(numbers == NONE, len(scene.names), numbers), names=names)


def _folders_of(table: FrameTable) -> Names:
    numbers_of: dict[str, int] = {}
    paths = (path.replace("\\", "/") for path in table.paths["rgb"])
    folders = (path.rpartition("/")[0] for path in paths)
    numbers = np.fromiter(
        (numbers_of.setdefault(folder, len(numbers_of)) for folder in folders),
        np.uint32,
        count=table.n_rows,
    )
    return Names(numbers=numbers, names=tuple(numbers_of))


def _split_rule(table: FrameTable, places: Names, settings: ConversionSettings) -> SplitRule | None:
    """How lines are dealt to splits; None: the table says. Raises WrongSetting."""
    if settings.split_by is not None:
        rule = SplitRule.parse(settings.split_by)
        if rule.by not in ("scene", "row", *table.columns):
            choices = ", ".join(("scene", "row", *table.columns))
            raise WrongSetting("split_by", settings.split_by, f"choose {choices}")
        return rule
    if table.split is not None:
        return None
    if len(places.names) >= FEWEST_PLACES:
        log(f"no column split: {len(places.names)} places are dealt")
        return SplitRule(by="scene")
    log("no column split, and too few places to deal: rows are dealt, whatever place they show")
    return SplitRule(by="row")


def _split_of(table: FrameTable, places: Names, rule: SplitRule | None) -> np.ndarray:
    """[N] |u1 of the lines, numbers of SPLITS."""
    if rule is None:
        assert table.split is not None
        return table.split
    if rule.by == "row":
        return rule.of_rows(table.n_rows)
    groups = places if rule.by == "scene" else table.columns[rule.by]
    # An empty cell is a group like any other.
    split = rule.of_groups(np.minimum(groups.numbers, len(groups.names)))
    shares = np.bincount(split, minlength=len(SPLITS)) / len(split)
    listed = ", ".join(f"{100 * shares[SPLITS.index(name)]:.0f} % {name}" for name in IN_ORDER)
    log(f"dealt by {rule.by}: {listed}")  # of few groups, or large ones, no deal is as was asked
    return split


def _facts_of(
    table: FrameTable,
    places: Names,
    split: np.ndarray,
    lines: np.ndarray,
    known_types: Sequence[str],
) -> _Facts:
    """Types of scenes that are not known are numbered by name, so that the same ones have the same
    numbers in any order of lines.
    """
    types = table.columns.get("scene_type")
    scene_type = np.full(table.n_rows, NO_SCENE_TYPE, "<u2")
    names: tuple[str, ...] = tuple(known_types)
    if types is not None:
        if len(types.names) > MAX_SCENE_TYPES:
            what = f"{len(types.names)} different ones: it is no column of types"
            raise WrongSource("scene_type", f"has {what}")
        names = (*known_types, *sorted(set(types.names) - set(known_types)))
        number_of_type = np.array([*(names.index(name) for name in types.names), NO_SCENE_TYPE])
        scene_type = number_of_type[np.minimum(types.numbers, len(types.names))].astype("<u2")
    return _Facts(
        split=split[lines],
        scene=places.numbers[lines],
        scene_type=scene_type[lines],
        scene_types=names,
        camera_px=None if table.camera_px is None else table.camera_px[lines],
    )


def _warnings(table: FrameTable, places: Names, split: np.ndarray) -> tuple[str, ...]:
    """What a user should know of the table, whatever is done with it."""
    found = []
    pairs = np.unique(places.numbers.astype(np.int64) * len(SPLITS) + split)
    shared, n_splits = np.unique(pairs // len(SPLITS), return_counts=True)
    in_several = shared[n_splits > 1]
    if len(in_several) and "scene" in table.columns:
        name = places.names[int(in_several[0])]
        found.append(f"{len(in_several)} places are in more than one split, such as {name}")
    if table.n_repeated:
        found.append(f"{table.n_repeated} lines name an rgb file that another line names too")
    return tuple(found)


def _dataset_name(path: Path, given: str | None) -> str:
    """Raises WrongSetting for a name that cannot be one."""
    if given is not None:
        if not NAME.fullmatch(given):
            raise WrongSetting("name", given, "choose a name of a-z, 0-9 and _, such as kitchens")
        return given
    stem = re.sub(r"[^a-z0-9]+", "_", path.resolve().stem.lower()).strip("_")
    return stem[:64] if NAME.fullmatch(stem[:64]) else f"set_{stem}"[:64].rstrip("_")


def _label_names(path: Path) -> tuple[str, ...]:
    """A name a line: of ids 1, 2, ...; of 0, 1, ... where another id than 0 is void.

    Raises WrongSource.
    """
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise WrongSource(path, f"cannot be read as UTF-8 text ({error})") from None
    while names and not names[-1]:
        names = names[:-1]
    if not names or not all(names) or len(names) > MAX_ID:
        raise WrongSource(path, f"has no name a line, 1 to {MAX_ID} of them")
    return names
