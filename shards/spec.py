"""What a set is made of: fields and their kinds, what is special to a dataset, and what a
conversion was asked for.

A field is a name and a kind. Five are known; others come with a source that has them:

    rgb        colour  (3, S, S) |u1
    depth      depth   (S, S)    <u2   millimetres, 0 = none
    raw_depth  depth   (S, S)    <u2   as measured
    label      id      (S, S)    <u2   0 = unlabelled
    instance   id      (S, S)    |u1   counts within its class
"""

import colorsys
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np

from shards.errors import WrongSetting, shown
from shards.strict_json import JsonObject

FORMAT_VERSION = 2  # of manifest.json
# Of what a fingerprint covers: unchanged since the first sets, whose names stay.
IDENTITY_VERSION = 1
RESIZE_VERSION = 2

MAX_DEPTH_MM = 32767
VOID = -100  # the class of a pixel or row without one, as torch's losses leave it out
NO_SCENE_TYPE = 65535  # in the column scene_type
SPLITS = ("train", "test", "val")  # by their numbers in the column; the first two as in version 1

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # of a dataset, a field, a column, a crop
ENCODING = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")  # of depth, such as 2d3ds
SPLIT_RULE = re.compile(r"[a-z][a-z0-9_]{0,63}(:[0-9.]+(,[0-9.]+){2})?")
MAX_ID = 65535  # of a label
DEPTH_RESIZES = ("nearest", "area")
AXES = ("auto", "wh", "hw")
Codecs = dict[str, str] | None  # the codec of each field of a Zarr set; None: .npy


# ------------------------------------------------------------------------------------------ fields


@dataclass(frozen=True, kw_only=True)
class FieldKind:
    """What fields of one kind have in common."""

    dtype: str
    planes: tuple[int, ...]  # before (S, S)
    unit: str
    invalid: int | None  # the value of a pixel without one
    resampling: str  # "antialiased", an average over the area of a pixel, or "nearest"


KINDS = {
    "colour": FieldKind(
        dtype="|u1", planes=(3,), unit="grey level 0..255", invalid=None, resampling="antialiased"
    ),
    "grey": FieldKind(
        dtype="|u1", planes=(), unit="grey level 0..255", invalid=None, resampling="antialiased"
    ),
    "grey16": FieldKind(
        dtype="<u2", planes=(), unit="grey level 0..65535", invalid=None, resampling="antialiased"
    ),
    "depth": FieldKind(dtype="<u2", planes=(), unit="millimetre", invalid=0, resampling="nearest"),
    "id": FieldKind(dtype="<u2", planes=(), unit="class id", invalid=0, resampling="nearest"),
}


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the train rows' valid pixels, one number a channel; depths in millimetres."""

    count: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def has_channels(self, n: int) -> bool:
        """Whether there is one of each a channel."""
        return len(self.count) == len(self.mean) == len(self.std) == n

    def to_json(self) -> dict[str, Any]:
        return {"count": list(self.count), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: JsonObject) -> "Statistics":
        return cls(
            count=value.wholes("count"), mean=value.numbers("mean"), std=value.numbers("std")
        )


@dataclass(frozen=True, kw_only=True)
class Field:
    """One kind of picture that every row has."""

    name: str
    kind: str  # a key of KINDS
    dtype: str
    planes: tuple[int, ...]
    unit: str
    invalid: int | None
    resampling: str
    statistics: Statistics | None = None  # None: ids, and sets without valid pixels in train rows

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def row_shape(self, size: int) -> tuple[int, ...]:
        """The shape of one stored row: (3, S, S) for colour, (S, S) for the rest."""
        return (*self.planes, size, size)

    def row_bytes(self, size: int) -> int:
        return math.prod(self.row_shape(size)) * self.itemsize

    def to_json(self, size: int) -> dict[str, Any]:
        statistics = self.statistics.to_json() if self.statistics else None
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.row_shape(size)),
            "unit": self.unit,
            "invalid": self.invalid,
            "resampling": self.resampling,
            "statistics": statistics,
        }

    @classmethod
    def from_json(cls, name: str, value: JsonObject, size: int) -> "Field":
        """Raises ValueError where it is no field of its kind."""
        value.only("kind", "dtype", "shape", "unit", "invalid", "resampling", "statistics")
        kind = value.text("kind")
        if kind not in KINDS or not NAME.fullmatch(name):
            raise ValueError(f"field {shown(name)} has the unknown kind {shown(kind)}")
        statistics = value.object_or_none("statistics")
        found = cls(
            name=name,
            kind=kind,
            dtype=value.text("dtype"),
            planes=KINDS[kind].planes,
            unit=value.text("unit"),
            invalid=value.whole_or_none("invalid"),
            resampling=value.text("resampling"),
            statistics=Statistics.from_json(statistics) if statistics else None,
        )
        dtypes = {KINDS[kind].dtype, "|u1"} if kind == "id" else {KINDS[kind].dtype}
        n_channels = found.planes[0] if found.planes else 1
        if found.statistics and not found.statistics.has_channels(n_channels):
            raise ValueError(f"field {name} has statistics of another number of channels")
        if found.dtype not in dtypes or value.wholes("shape") != found.row_shape(size):
            raise ValueError(f"field {name} has another type or shape than its kind")
        return found


def field_of_kind(name: str, kind: str, **special: Any) -> Field:
    """A field as its kind is, but for what is `special` to it (dtype, unit).

    Raises WrongSetting for a name or kind that cannot be one.
    """
    if not NAME.fullmatch(name) or name == "rows":  # rows-*.npy are the columns
        raise WrongSetting("field", name, "choose a name of a-z, 0-9 and _, such as thermal")
    if kind not in KINDS:
        raise WrongSetting("field", f"{name}={kind}", f"choose one of {', '.join(KINDS)}")
    return Field(name=name, kind=kind, **{**asdict(KINDS[kind]), **special})


KNOWN_FIELDS = {
    known.name: known
    for known in (
        field_of_kind("rgb", "colour"),
        field_of_kind("depth", "depth"),
        field_of_kind("raw_depth", "depth"),
        field_of_kind("label", "id"),
        field_of_kind("instance", "id", dtype="|u1", unit="number within its class"),
    )
}


# ------------------------------------------------------------------------------------- the dataset


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of a picture, in its pixels: rows top .. bottom, columns left .. right."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera, in pixels of the whole picture; the centre of its first pixel is at 0."""

    fx: float
    fy: float
    cx: float
    cy: float

    def as_shares(self, box: Box) -> tuple[float, float, float, float]:
        """Focal lengths and centre as shares of the part `box` of a picture: the column camera."""
        box_width = box.right - box.left
        box_height = box.bottom - box.top
        centre_x = (self.cx + 0.5 - box.left) / box_width
        centre_y = (self.cy + 0.5 - box.top) / box_height
        return self.fx / box_width, self.fy / box_height, centre_x, centre_y


@dataclass(frozen=True, kw_only=True)
class SceneProtocol:
    """Which scene types are classes by themselves, and what becomes of the others."""

    classes: tuple[str, ...]  # in the order of their ids
    others: str | None = None  # one class for every other type, the last; None: left out

    @property
    def names(self) -> tuple[str, ...]:
        return self.classes if self.others is None else (*self.classes, self.others)

    def ids_of(self, scene_types: Sequence[str]) -> np.ndarray:
        """[T] int64: the class of each type; -1 = left out."""
        rest = -1 if self.others is None else len(self.classes)
        ids = {name: k for k, name in enumerate(self.classes)}
        return np.array([ids.get(name, rest) for name in scene_types], np.int64)


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """The stored label ids grouped into fewer classes."""

    names: tuple[str, ...]  # of classes 1, 2, ...
    ids: tuple[int, ...]  # of each stored id from 0: its class, 0 = void


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """All that is special to a dataset; everything else works for any.

    `width` and `height` are those of the pictures that `crops` and `camera` are measured in; both
    are 0 where pictures differ in size, which then have neither (each row's size and camera are
    columns). A crop named "none", the whole picture, is always there.
    """

    name: str
    width: int
    height: int
    scene_types: tuple[str, ...] = ()
    protocols: tuple[SceneProtocol, ...] = ()
    default_n_classes: int | None = None  # of the protocol to train with; None: every type
    label_names: tuple[str, ...] = ()  # of ids 1, 2, ...
    label_tables: tuple[LabelTable, ...] = ()
    crops: Mapping[str, Box] = field(default_factory=dict)
    depth_crop: str = "none"  # the crop in which depth is scored
    camera: Camera | None = None  # where it is one for every row
    warnings: tuple[str, ...] = ()

    def crop_box(self, crop: str) -> Box:
        """Raises WrongSetting for a name that the dataset does not have."""
        if crop == "none":
            return Box(top=0, bottom=self.height, left=0, right=self.width)
        if crop not in self.crops:
            raise WrongSetting("crop", crop, f"choose one of {', '.join(['none', *self.crops])}")
        return self.crops[crop]

    def protocol(self, n_classes: int | None) -> SceneProtocol:
        """The scene protocol of so many classes; None: the default one.

        Every scene type as a class of its own is always one. Raises WrongSetting.
        """
        every_type = SceneProtocol(classes=self.scene_types)
        known = {len(each.names): each for each in (every_type, *self.protocols)}
        default = self.default_n_classes or len(self.scene_types)
        wanted = default if n_classes is None else n_classes
        if wanted not in known:
            choices = [str(n) for n in sorted(known)]
            listed = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
            if len(choices) == 1:
                listed = f"{listed}, as this set has scene types, or none"
            raise WrongSetting("num_classes", wanted, f"choose {listed}")
        return known[wanted]

    def label_table(self, n_classes: int | None) -> LabelTable:
        """The table of so many classes; None: every stored id by itself. Raises WrongSetting."""
        if n_classes in (None, len(self.label_names)):
            return LabelTable(names=self.label_names, ids=tuple(range(len(self.label_names) + 1)))
        known = {len(table.names): table for table in self.label_tables}
        if n_classes not in known:
            choices = ["semantic", *(f"semantic{n}" for n in sorted(known))]
            listed = f"of its labels this set has {', '.join(choices)}"
            raise WrongSetting("target", f"semantic{n_classes}", listed)
        return known[n_classes]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: JsonObject) -> "DatasetSpec":
        """Raises ValueError where it is none."""
        value.only(*(each.name for each in dataclass_fields(cls)))
        camera = value.object_or_none("camera")
        spec = cls(
            name=value.text("name"),
            scene_types=value.texts("scene_types"),
            protocols=tuple(map(_protocol_from_json, value.objects("protocols"))),
            default_n_classes=value.whole_or_none("default_n_classes"),
            label_names=value.texts("label_names"),
            label_tables=tuple(map(_label_table_from_json, value.objects("label_tables"))),
            width=value.whole("width"),
            height=value.whole("height"),
            crops={name: _box_from_json(box) for name, box in value.object("crops").items()},
            depth_crop=value.text("depth_crop"),
            camera=_camera_from_json(camera) if camera else None,
            warnings=value.texts("warnings"),
        )
        spec.check()
        return spec

    def _has_one_size(self) -> bool:
        return 0 < self.width < 2**16 and 0 < self.height < 2**16

    def check(self) -> None:
        """Raise ValueError where readers could not rely on it."""
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{shown(self.name)} is no name of a dataset")
        if not self._has_one_size() and (self.crops or self.camera or self.width or self.height):
            raise ValueError("its pictures have no size")
        for name, box in self.crops.items():
            is_inside = box.top < box.bottom <= self.height and box.left < box.right <= self.width
            if not NAME.fullmatch(name) or name == "none" or not is_inside:
                raise ValueError(f"crop {shown(name)} is no part of its pictures")
        if self.depth_crop not in ("none", *self.crops):
            raise ValueError(f"depth_crop {shown(self.depth_crop)} is none of its crops")
        for table in self.label_tables:
            if len(table.ids) != len(self.label_names) + 1 or table.ids[0] != 0:
                raise ValueError("a label table is not one of its labels")
            if max(table.ids) > len(table.names):
                raise ValueError("a label table leads to a class without a name")
        for protocol in self.protocols:
            if len(set(protocol.names)) != len(protocol.names):
                raise ValueError("a scene protocol names a class twice")
        if self.camera and not (self.camera.fx > 0 and self.camera.fy > 0):
            raise ValueError("its camera has no focal length")


def _protocol_from_json(value: JsonObject) -> SceneProtocol:
    value.only("classes", "others")
    return SceneProtocol(classes=value.texts("classes"), others=value.text_or_none("others"))


def _label_table_from_json(value: JsonObject) -> LabelTable:
    value.only("names", "ids")
    return LabelTable(names=value.texts("names"), ids=value.wholes("ids"))


def _box_from_json(value: JsonObject) -> Box:
    value.only("top", "bottom", "left", "right")
    return Box(
        top=value.whole("top"),
        bottom=value.whole("bottom"),
        left=value.whole("left"),
        right=value.whole("right"),
    )


def _camera_from_json(value: JsonObject) -> Camera:
    value.only("fx", "fy", "cx", "cy")
    return Camera(
        fx=value.number("fx"), fy=value.number("fy"), cx=value.number("cx"), cy=value.number("cy")
    )


# ------------------------------------------------------------------------------------ the settings


def is_number(value: Any) -> bool:
    """A number of Python's or numpy's, which True is not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """A whole number of Python's or numpy's, which True is not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


AUTO_ROWS = 0  # rows a shard: as many as suit the number of rows
DEALT = 1  # the order of a table's rows: train, val, test, each dealt by a hash of its line
EXIF = "exif"  # pictures are turned as their EXIF orientation says


@dataclass(frozen=True)
class ConversionSettings:
    """What a set contains. Other settings are another directory, never a mixture.

    fields: names; the default ones mean every field that the source has. kinds: of the fields that
    are not among the five known ones. rows_per_shard: AUTO_ROWS until the source is known. axes:
    "wh" or "hw" where pictures are square, "auto" where they tell by themselves.

    Of tables of frames alone; each is at its default in the set of a .mat:
    depth_encoding: how depth is stored (a name), or depth_scale: stored units a metre.
    depth_trunc: metres; what is farther becomes 0. label_void: the stored id that is void; the
    others move up by one, where it is not 0 itself. split_by: "scene", "row" or a column, with
    shares behind a colon. orientation, order_version: the source's to tell.

    Raises WrongSetting.
    """

    fields: tuple[str, ...] = tuple(KNOWN_FIELDS)
    size: int = 224
    crop: str = "none"
    depth_resize: str = "nearest"
    rows_per_shard: int = AUTO_ROWS
    axes: str = "auto"
    kinds: Mapping[str, str] = field(default_factory=dict)
    depth_encoding: str | None = None
    depth_scale: float | None = None
    depth_trunc: float | None = None
    label_void: int | None = None
    split_by: str | None = None
    orientation: str | None = None
    order_version: int = 0

    def __post_init__(self) -> None:
        self._check_fields()
        for name, low, high in (("size", 8, 1024), ("rows_per_shard", AUTO_ROWS, 100_000)):
            value = getattr(self, name)
            if not is_whole(value) or not low <= value <= high:
                raise WrongSetting(name, value, f"choose {low or 1} to {high}")
            object.__setattr__(self, name, int(value))
        for name, choices in (("depth_resize", DEPTH_RESIZES), ("axes", AXES)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise WrongSetting(name, value, f"choose one of {', '.join(choices)}")
        if not isinstance(self.crop, str) or not NAME.fullmatch(self.crop):
            raise WrongSetting("crop", self.crop, "choose none, or a crop that the dataset has")
        self._check_depth()
        self._check_table()

    def _check_depth(self) -> None:
        encoding = self.depth_encoding
        if encoding is not None and not (
            isinstance(encoding, str) and ENCODING.fullmatch(encoding)
        ):
            raise WrongSetting("depth_encoding", encoding, "choose a name, such as mm")
        for name in ("depth_scale", "depth_trunc"):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_number(value) or not 0 < value < math.inf:
                raise WrongSetting(name, value, "choose a number above 0")
            object.__setattr__(self, name, float(value))
        if encoding is not None and self.depth_scale is not None:
            raise WrongSetting("depth_scale", self.depth_scale, f"{encoding} says it already")

    def _check_table(self) -> None:
        void = self.label_void
        if void is not None and not (is_whole(void) and 0 <= void <= MAX_ID):
            raise WrongSetting("label_void", void, f"choose 0 to {MAX_ID}")
        rule = self.split_by
        if rule is not None and not (isinstance(rule, str) and SPLIT_RULE.fullmatch(rule)):
            choices = "choose scene, row or a column, and shares such as scene:0.8,0.1,0.1"
            raise WrongSetting("split_by", rule, choices)
        if self.orientation not in (None, EXIF):
            raise WrongSetting("orientation", self.orientation, f"choose {EXIF}, or none")
        if not is_whole(self.order_version) or self.order_version not in (0, DEALT):
            raise WrongSetting("order_version", self.order_version, f"choose 0 or {DEALT}")

    def _check_fields(self) -> None:
        is_list = isinstance(self.fields, tuple | list)
        names = list(self.fields) if is_list else []
        are_names = all(isinstance(name, str) and NAME.fullmatch(name) for name in names)
        if not names or not are_names or len(set(names)) < len(names):
            given = ",".join(map(str, self.fields)) if is_list else repr(self.fields)
            raise WrongSetting("fields", given, f"choose from {','.join(KNOWN_FIELDS)}, each once")
        may_have_kind = set(names) - KNOWN_FIELDS.keys()
        if not isinstance(self.kinds, Mapping) or not self.kinds.keys() <= may_have_kind:
            raise WrongSetting("kinds", repr(self.kinds), "give the kind of fields that are stored")
        known_first = [name for name in KNOWN_FIELDS if name in names]
        others = [name for name in names if name not in KNOWN_FIELDS]
        object.__setattr__(self, "fields", (*known_first, *others))
        object.__setattr__(self, "kinds", dict(self.kinds))

    def fits(self, stored: "ConversionSettings") -> bool:
        """Whether a set of `stored` is what is asked for.

        `axes` were left out of it where the pictures told them; the kinds of fields, how many rows
        suit a shard, and what a table is by itself, are the source's to tell.
        """
        asked = replace(
            self,
            kinds=stored.kinds if self.fields == stored.fields else {},
            split_by=self.split_by or stored.split_by,
            orientation=stored.orientation,
            order_version=stored.order_version,
        )
        if self.are_all_fields and not stored.are_all_fields and stored.order_version == DEALT:
            asked = replace(asked, fields=stored.fields, kinds=stored.kinds)  # all that it had
        if asked.rows_per_shard == AUTO_ROWS:
            asked = replace(asked, rows_per_shard=stored.rows_per_shard)
            if stored.rows_per_shard not in SUITABLE_ROWS:
                return False
        return stored in (asked, replace(asked, axes="auto"))

    def of_source(self, fields: Sequence[Field], n_rows: int) -> "ConversionSettings":
        """The same for a source with these fields. Raises WrongSetting for one that it lacks."""
        there = {each.name: each for each in fields}
        names = tuple(there) if self.are_all_fields else self.fields
        if not set(names) <= there.keys():
            raise WrongSetting(
                "fields", ",".join(names), f"choose from {','.join(there)}, each once"
            )
        kinds = {name: there[name].kind for name in names if name not in KNOWN_FIELDS}
        rows = self.rows_per_shard
        if rows == AUTO_ROWS:
            rows = rows_per_shard_for(n_rows, [there[name] for name in names], self.size)
        return replace(self, fields=names, kinds=kinds, rows_per_shard=rows)

    @property
    def are_all_fields(self) -> bool:
        """Whether `fields` are the default ones, and those that `kinds` adds."""
        return set(self.fields) == {*KNOWN_FIELDS, *self.kinds}

    def to_json(self) -> dict[str, Any]:
        """For the manifest and the fingerprint; what came later is left out at its default."""
        values = {
            "fields": list(self.fields),
            "size": self.size,
            "crop": self.crop,
            "depth_resize": self.depth_resize,
            "rows_per_shard": self.rows_per_shard,
        }
        if self.axes != "auto":
            values["axes"] = self.axes
        if self.kinds:
            values["kinds"] = dict(self.kinds)
        for name, default in OF_TABLES.items():
            if getattr(self, name) != default:
                values[name] = getattr(self, name)
        return values

    @classmethod
    def from_json(cls, value: JsonObject) -> "ConversionSettings":
        """Raises ValueError, or WrongSetting for a value that no set has."""
        value.only(*OF_EVERY_SET, "axes", "kinds", *OF_TABLES)
        kinds = value.object("kinds") if "kinds" in value else JsonObject({}, "kinds")
        return cls(
            fields=value.texts("fields"),
            size=value.whole("size"),
            crop=value.text("crop"),
            depth_resize=value.text("depth_resize"),
            rows_per_shard=_at_least_one(value.whole("rows_per_shard")),
            axes=value.text("axes") if "axes" in value else "auto",
            kinds={name: kinds.text(name) for name in kinds.keys()},  # noqa: SIM118 (no dict)
            depth_encoding=_text_if_there(value, "depth_encoding"),
            depth_scale=_number_if_there(value, "depth_scale"),
            depth_trunc=_number_if_there(value, "depth_trunc"),
            label_void=value.whole("label_void") if "label_void" in value else None,
            split_by=_text_if_there(value, "split_by"),
            orientation=_text_if_there(value, "orientation"),
            order_version=value.whole("order_version") if "order_version" in value else 0,
        )


OF_EVERY_SET = ("fields", "size", "crop", "depth_resize", "rows_per_shard")
# What came with tables, by its default: at that it is left out, and earlier fingerprints stay.
OF_TABLES: dict[str, Any] = {
    "depth_encoding": None,
    "depth_scale": None,
    "depth_trunc": None,
    "label_void": None,
    "split_by": None,
    "orientation": None,
    "order_version": 0,
}


def _text_if_there(value: JsonObject, key: str) -> str | None:
    return value.text(key) if key in value else None


def _number_if_there(value: JsonObject, key: str) -> float | None:
    return value.number(key) if key in value else None


def _at_least_one(n_rows: int) -> int:
    if n_rows < 1:
        raise ValueError("its shards have no rows")
    return n_rows


@dataclass(frozen=True, kw_only=True)
class SourceIdentity:
    """Which source it was. sha256: of a "mat" over sampled blocks, of a "table" over its lines."""

    kind: str
    name: str
    n_bytes: int
    sha256: str

    def content(self) -> dict[str, Any]:
        """What the fingerprint covers: not the name. Of a .mat as in version 1."""
        if self.kind == "mat":
            return {"bytes": self.n_bytes, "sampled_sha256": self.sha256}
        return {"kind": self.kind, "bytes": self.n_bytes, "sha256": self.sha256}

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, **self.content()}

    @classmethod
    def from_json(cls, value: JsonObject) -> "SourceIdentity":
        kind = value.text("kind")
        digest = "sampled_sha256" if kind == "mat" else "sha256"
        value.only("kind", "name", "bytes", digest)
        return cls(
            kind=kind,
            name=value.text("name"),
            n_bytes=value.whole("bytes"),
            sha256=value.text(digest),
        )


def fingerprint(settings: ConversionSettings, source: SourceIdentity) -> str:
    """SHA-256 over everything that decides the content; the container and the codec do not."""
    content = {
        "format": IDENTITY_VERSION,
        "resize": RESIZE_VERSION,
        "settings": settings.to_json(),
        "source": source.content(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


USUAL_ROWS = 128  # a shard
MANY_ROWS = 100_000  # of a set, from which on shards are larger
SUITABLE_ROWS = (128, 256, 512, 1024)  # what rows_per_shard_for may say
MAX_FILE_BYTES = 64 << 20
MAX_SHARD_BYTES = 128 << 20  # of all its files


def rows_per_shard_for(n_rows: int, fields: Iterable[Field], size: int) -> int:
    """128 up to 100,000 rows; beyond, the largest power of two up to 1,024 that keeps files small.

    A file stays under 64 MiB, and all files of a shard under 128 MiB.
    """
    rows = USUAL_ROWS
    if n_rows <= MANY_ROWS:
        return rows
    row_bytes = [each.row_bytes(size) for each in fields]
    while rows < SUITABLE_ROWS[-1]:
        doubled = 2 * rows
        fits_file = doubled * max(row_bytes) < MAX_FILE_BYTES
        fits_shard = doubled * sum(row_bytes) < MAX_SHARD_BYTES
        if not (fits_file and fits_shard):
            break
        rows = doubled
    return rows


# ------------------------------------------------------------------------------------- the palette

VOID_GREY = 0.13


def class_colours(n: int) -> np.ndarray:
    """(n + 1, 3) RGB 0..1: void dark grey, then hues far apart for ids that are close."""
    colours = [(VOID_GREY, VOID_GREY, VOID_GREY)]
    for k in range(1, n + 1):
        hue = k * 0.618034 % 1
        saturation = 0.42 + 0.3 * (k * 0.7548777 % 1)
        value = 0.62 + 0.33 * (k * 0.5698403 % 1)
        colours.append(colorsys.hsv_to_rgb(hue, saturation, value))
    return np.array(colours)
