"""The dataset and its loaders: memory maps opened lazily in each process, one gather a field a batch.

A batch is the fields asked for, then the target; by default (rgb, depth, label). `normalize=False` hands over what is
stored (uint8 rgb, int16 millimetres, int64 target), to be converted on the device.
"""

import ctypes
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convert.format import FIELDS, MANIFEST, SPLITS, VOID, UserError, log, open_set, read_manifest, resolve_set
from drive.mount import refuse_remote
from ring.loader import Loader, Maker, Transform, worker_count
from ring.slots import Layout, arrays_in, n_bytes_of, private_memory, tensors_in
from train.augment import normalize_depth, normalize_rgb
from train.order import Batches

SCENE_10 = [
    "bedroom", "kitchen", "living_room", "bathroom", "dining_room", "office", "home_office", "classroom", "bookstore",
]  # fmt: skip
SCENE_13 = [*SCENE_10, "playroom", "study", "reception_room"]
TARGETS = {  # and the field each is read from
    "scene": "", "semantic13": "label", "semantic40": "label", "semantic894": "label", "depth": "depth",
    "instance": "instance",
}  # fmt: skip
INPUTS = ("rgb", "depth", "raw_depth")


def scene_classes(num_classes: int, scene_types: list[str]) -> list[str]:
    """The scene class names in id order: 27 as stored, 10 and 13 with `others` last."""
    every = len(scene_types)
    classes = {every: list(scene_types), 10: [*SCENE_10, "others"], 13: [*SCENE_13, "others"]}
    if num_classes not in classes:
        raise UserError(f"num_classes {num_classes}: choose 10, 13 or {every}. Run: python -m train --num-classes 13")
    return classes[num_classes]


class ShardDataset(Dataset[tuple[Tensor, ...]]):
    """Rows of one split of a converted set.

    `ds[i]` is (rgb [3,H,W], depth [1,H,W], target); `batch(indices)` the same with a leading batch axis.
    `device`: all rows are kept there as tensors (250 KB a row at 224), and so are batches.
    Pickles its path and settings only; everything else is reopened where it lands. Raises UserError for a set that
    is damaged, lacks a field, or has no row in the split.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        fields: tuple[str, ...] | None = None,
        target: str = "scene",
        num_classes: int = 13,
        normalize: bool = False,
        device: str | torch.device | None = None,
        allow_remote: bool = False,
    ) -> None:
        if split not in (*SPLITS, "all") or target not in TARGETS:
            choices = f"train, test, all and {', '.join(TARGETS)}"
            raise UserError(f"split {split!r}, target {target!r}: choose from {choices}")
        self.path = resolve_set(path)
        if not allow_remote:
            refuse_remote(self.path)
        self.path = unpacked(self.path)
        self.split, self.target, self.num_classes, self.normalize = split, target, num_classes, normalize
        self.fields = fields or (("rgb",) if target == "depth" else ("rgb", "depth"))
        if not set(self.fields) <= set(INPUTS):
            raise UserError(f"fields {self.fields}: choose from {', '.join(INPUTS)}")
        self._open()
        if device is not None:
            self._parts = [part.to(device) for part in self.stored(np.arange(len(self)))]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        """Read the manifest and the per-row columns; maps wait for the first row that is asked for."""
        self._set, self._maps, self._parts = open_set(self.path), dict[str, list[np.ndarray]](), list[Tensor]()
        for field in filter(None, (*self.fields, TARGETS[self.target])):
            self._set.check_has(field)
        manifest, split = self._set.manifest, self._set.column("split")
        self.size, self.fingerprint = self._set.settings.size, str(manifest["fingerprint"])
        self.crop = self._set.settings.crop
        self._rows = np.arange(len(split)) if self.split == "all" else np.flatnonzero(split == SPLITS.index(self.split))
        if not len(self._rows):
            raise UserError(f"{self.path} has no {self.split} rows. Run: make convert with a .mat that has some")
        self._read_names(manifest["names"])
        statistics = manifest["fields"].get("depth", {}).get("statistics") or {"mean": [math.nan], "std": [math.nan]}
        self.depth_mean, self.depth_std = statistics["mean"][0] / 1000, max(statistics["std"][0] / 1000, 1e-6)
        if self.normalize and set(self.fields) != {"rgb"} and not self.depth_mean >= 0:
            raise UserError(f"{self.path} has no train rows with depth to take statistics from. Run: make convert")

    def _read_names(self, names: dict[str, Any]) -> None:
        """The classes, and what turns a stored scene type or label into one: void is -100, torch's ignore_index."""
        self.classes: list[str] = []
        if self.target == "scene":
            self.classes = scene_classes(self.num_classes, names["scene_types"])
            ids = {name: i for i, name in enumerate(self.classes)}
            table = np.array([ids.get(name, len(ids) - 1) for name in names["scene_types"]], np.int64)
            self._scene_ids = table[self._set.column("scene_type")]
        elif self.target.startswith("semantic"):
            k = self.target.removeprefix("semantic").replace("894", "")
            self.classes = list(names[f"classes{k}"])
            ids_k = np.array(names[f"to{k}"] if k else range(len(names["classes"]) + 1), np.int64)
            self._lut = np.where(ids_k > 0, ids_k - 1, VOID)

    def __repr__(self) -> str:
        return f"ShardDataset({str(self.path)!r}, split={self.split!r})"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        position = range(len(self))[index]  # from the end too, and an IndexError beyond
        return tuple(part[0] for part in self.batch(np.array([position])))

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        """One gather for the whole batch, handed over as rows (views), as torch's default collate wants them."""
        return list(zip(*self.batch(np.asarray(indices)), strict=True))

    def labels(self) -> np.ndarray:
        """[N] int64: the scene class of every row of the split."""
        if self.target != "scene":
            raise UserError("labels() is for target='scene'")
        return self._scene_ids[self._rows]

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Positions in the split -> row numbers of the set; a bad one is an IndexError."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"positions {indices.min()}..{indices.max()} of {len(self)} rows")
        return self._rows[indices]

    def _map(self) -> None:
        """Open the memory maps: on first use in each process.

        Seen as pieces of rows at any address between the first map and the end of the last, all shards and fields are
        one table, and a batch is one index_select, which lets other threads run meanwhile. Below 32768 elements torch
        divides the pieces among its threads, above that every single piece.
        """
        maps = {field: self._set.shards(field) for field in {*self.fields, TARGETS[self.target]} if field}
        ends = [(shard.ctypes.data, shard.nbytes) for shards in maps.values() for shard in shards]
        low, high = min(start for start, _ in ends), max(map(sum, ends))
        self._starts = {f: np.array([shard.ctypes.data for shard in shards]) - low for f, shards in maps.items()}
        piece = self.size * max(d for d in range(1, self.size + 1) if self.size % d == 0 and self.size * d < 32768)
        memory = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low)))
        self._pieces = memory.as_strided((high - low - piece + 1, piece), (1, 1))
        self._maps = maps  # last: another thread may look

    def _gather(self, fields: tuple[str, ...], rows: np.ndarray, buffer: memoryview | None = None) -> np.ndarray:
        """The bytes of rows that exist, field after field, the widest first, in `buffer` or in new memory.

        Python's lock is let go only for the copy (as numpy does above 500 numbers, and torch for every operation): to
        get it back beside a training step that holds it takes 5 ms.
        """
        if not self._maps:
            self._map()
        piece, at = self._pieces.shape[1], 0
        sizes = {field: self._maps[field][0][0].nbytes // piece for field in fields}
        index = np.empty(len(rows) * sum(sizes.values()), np.int64)
        for field in sorted(fields, key=lambda field: -self._maps[field][0].itemsize):
            n_rows, n_pieces = len(self._maps[field][0]), sizes[field]
            starts = self._starts[field][rows // n_rows] + rows % n_rows * (n_pieces * piece)
            for k in range(n_pieces):
                index[at + k : at + len(rows) * n_pieces : n_pieces] = starts + k * piece
            at += len(rows) * n_pieces
        size = len(index) * piece
        out = np.empty(size, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8, size)
        into = torch.from_numpy(out.reshape(len(index), piece))
        torch.index_select(self._pieces, 0, torch.from_numpy(index), out=into)
        return out

    def _layout(self, n: int) -> Layout:
        """Of a stored batch of n rows. Depth is at most 32767 mm: as int16 it has the bits of the uint16 on disk."""
        plane = self.size, self.size
        inputs = [("u1", (n, 3, *plane)) if field == "rgb" else ("i2", (n, 1, *plane)) for field in self.fields]
        target = {"scene": ("i8", (n,)), "depth": ("f4", (n, 1, *plane))}.get(self.target, ("i8", (n, *plane)))
        return [(np.dtype(kind), shape) for kind, shape in (*inputs, target)]

    def fill(self, buffer: memoryview, indices: np.ndarray) -> Layout | tuple[Tensor, ...]:
        """Gather a batch in `buffer`: its layout there; or the batch, where there is something to compute."""
        return self.batch(indices) if self.normalize or self._parts else self._fill(buffer, indices)

    def _fill(self, buffer: memoryview, indices: np.ndarray) -> Layout:
        rows, layout = self.rows_of(indices), self._layout(len(indices))
        target = arrays_in(buffer, layout)[-1]  # no part is wider: it lies first
        if field := TARGETS[self.target]:
            stored = self._gather((field,), rows).view(FIELDS[field]["dtype"]).reshape(target.shape)
            stored = self._lut[stored] if field == "label" else stored
            target[:] = stored / np.float32(1000) if field == "depth" else stored
        else:
            target[:] = self._scene_ids[rows]
        self._gather(self.fields, rows, buffer[target.nbytes :])
        return layout

    def stored(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """`batch` before normalising."""
        if self._parts:
            self.rows_of(indices)  # they exist
            index = torch.as_tensor(indices, device=self._parts[0].device)
            return tuple(part.index_select(0, index) for part in self._parts)
        buffer = private_memory(n_bytes_of(self._layout(len(indices))))
        return tensors_in(buffer, self._fill(buffer, indices))

    def batch(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """The fields asked for, as float32 inputs where `normalize`, then the target."""
        *inputs, target = self.stored(indices)
        if self.normalize:
            stats, pairs = (self.depth_mean, self.depth_std), zip(self.fields, inputs, strict=True)
            inputs = [normalize_rgb(part) if field == "rgb" else normalize_depth(part, *stats) for field, part in pairs]
        return (*inputs, target)


def unpacked(path: Path) -> Path:
    """The set; of a compressed one the .npy copy beside it, made once, by `convert`: zarr is never loaded here."""
    if path.suffix != ".zarr" or set(read_manifest(path)["codecs"].values()) == {"none"}:
        return path
    copy = path.with_suffix("")
    if not (copy / MANIFEST).is_file():
        log(f"{path} is compressed: unpacking it once, into {copy}")
        command = [sys.executable, "-m", "convert", "run", str(path.absolute()), "--out", str(path.parent.absolute())]
        if subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"{path} could not be unpacked. Run: {' '.join(['python', *command[1:]])}")
    return copy


def create_dataloaders(
    dataset_path: str | Path,
    *,
    batch_size: int = 128,
    num_workers: int | str = "auto",
    num_classes: int = 13,
    target: str = "scene",
    normalize: bool = True,
    target_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    fields: tuple[str, ...] | None = None,
    start_method: str | None = None,
    rank: int = 0,
    world: int = 1,
    transform: Transform | None = None,
    val_transform: Transform | None = None,
    prefetch: bool = True,
    cache: str | None = None,
    device: str | torch.device | None = None,
    allow_remote: bool = False,
) -> tuple[Loader, Loader]:
    """(train_loader, val_loader) over the official split of a converted set.

    dataset_path: a finished set or a ROOT that holds exactly one. num_workers: 0 gathers in one thread (in the caller
    with prefetch=False), "auto" measures how long a batch takes to make. target_size: None, or the set's own size.
    transform, val_transform: batch -> batch, run in the workers. cache="device": the train rows stay on `device`.
    allow_remote: read a set on a FUSE mount all the same. Raises UserError for a wrong setting.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: at least 1. Run: python -m train --batch-size 128")
    if num_workers != "auto" and not (str(num_workers).isdecimal() and int(num_workers) <= 64):
        raise UserError(f"num_workers {num_workers!r}: 'auto' or 0 to 64. Run: python -m train --num-workers auto")
    if cache not in (None, "device"):
        raise UserError(f"cache {cache!r}: 'device' or None")
    chosen: dict[str, Any] = {"target": target, "num_classes": num_classes, "normalize": normalize, "fields": fields}

    def loader(split: str, change: Transform | None, place: Any = None) -> Loader:
        dataset = ShardDataset(dataset_path, split=split, device=place, allow_remote=allow_remote, **chosen)
        if target_size not in (None, have := dataset.size, (have, have), [have, have]):
            hint = f"Run: make convert ARGS='--size {np.min(target_size)}'"
            raise UserError(f"{dataset.path} is {have}x{have}, not {target_size}. {hint}")
        maker = Maker(dataset, change, 0)
        workers = 0 if place else worker_count(num_workers, maker, batch_size, len(dataset), split)
        batches = Batches(len(dataset), batch_size, seed if split == "train" else None, rank, world)
        ahead = prefetch and place is None
        return Loader(dataset, batches, workers, start_method, prefetch=ahead, transform=change, seed=seed)

    place = cache and (device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loader("train", transform, place), loader("test", val_transform)
