"""The dataset and its loaders: memory maps opened lazily in each process, one gather a field a batch.

A batch is the fields asked for, then the target; by default (rgb, depth, label). `normalize=False` hands over what is
stored (uint8 rgb, int16 millimetres, int64 target), to be converted on the device.
"""

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from loader.buffers import Layout, arrays_in, n_bytes_of, private_memory, tensors_in
from loader.forks import use_one_thread_in_a_fork
from loader.loader import BatchMaker, Loader, Transform, worker_count
from shards.format import FIELDS, SPLITS, VOID, UserError, open_set, resolve_set
from stores.mounted import refuse_remote
from train.arguments import (
    check_cache,
    check_choice,
    check_device,
    check_fields,
    check_flags,
    check_function,
    check_path,
    check_start_method,
    check_target_size,
    check_whole,
    check_workers,
    one_whole_number,
    whole_numbers,
)
from train.augment import normalize_depth, normalize_rgb
from train.order import Batches
from train.unpack import unpacked

SCENE_10 = [
    "bedroom", "kitchen", "living_room", "bathroom", "dining_room", "office", "home_office", "classroom", "bookstore",
]  # fmt: skip
SCENE_13 = [*SCENE_10, "playroom", "study", "reception_room"]
TARGETS = {  # and the field each is read from
    "scene": "", "semantic13": "label", "semantic40": "label", "semantic894": "label", "depth": "depth",
    "instance": "instance",
}  # fmt: skip
INPUTS = ("rgb", "depth", "raw_depth")
OPENED = {"_set", "_mapped", "_parts", "_rows", "_scene_ids", "_lut"}  # again, wherever a dataset is unpickled


def scene_classes(num_classes: int, scene_types: list[str]) -> list[str]:
    """The scene class names in id order: 27 as stored, 10 and 13 with `others` last."""
    every = len(scene_types)
    classes = {every: list(scene_types), 10: [*SCENE_10, "others"], 13: [*SCENE_13, "others"]}
    if num_classes not in classes:
        raise UserError(f"num_classes {num_classes}: choose 10, 13 or {every}. Run: python -m train --num-classes 13")
    return classes[num_classes]


@dataclass(frozen=True)
class Mapped:
    """The shards of some fields as one table of row pieces; made as a whole, then never changed.

    Seen as pieces of rows at any address between the first map and the end of the last, all shards and fields are one
    table, and a batch is one index_select, which lets other threads run meanwhile. Below 32768 elements torch divides
    the pieces among its threads, above that every single piece. `pieces` is over raw addresses: it lives no longer
    than `maps`, and never reaches anybody without them.
    """

    maps: dict[str, list[np.ndarray]]
    starts: dict[str, np.ndarray]  # of each shard, from the first address
    pieces: Tensor

    @classmethod
    def of(cls, maps: dict[str, list[np.ndarray]], size: int) -> "Mapped":
        ends = [(shard.ctypes.data, shard.nbytes) for shards in maps.values() for shard in shards]
        low, high = min(start for start, _ in ends), max(map(sum, ends))
        starts = {f: np.array([shard.ctypes.data for shard in shards]) - low for f, shards in maps.items()}
        piece = size * max(d for d in range(1, size + 1) if size % d == 0 and size * d < 32768)
        memory = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low)))
        return cls(maps, starts, memory.as_strided((high - low - piece + 1, piece), (1, 1)))

    def gather(self, fields: tuple[str, ...], rows: np.ndarray, buffer: memoryview | None = None) -> np.ndarray:
        """The bytes of rows that exist, field after field, the widest first, in `buffer` or in new memory.

        Python's lock is let go only for the copy (as numpy does above 500 numbers, and torch for every operation): to
        get it back beside a training step that holds it takes 5 ms.
        """
        piece, at = self.pieces.shape[1], 0
        sizes = {field: self.maps[field][0][0].nbytes // piece for field in fields}
        index = np.empty(len(rows) * sum(sizes.values()), np.int64)
        for field in sorted(fields, key=lambda field: -self.maps[field][0].itemsize):
            n_rows, n_pieces = len(self.maps[field][0]), sizes[field]
            starts = self.starts[field][rows // n_rows] + rows % n_rows * (n_pieces * piece)
            for k in range(n_pieces):
                index[at + k : at + len(rows) * n_pieces : n_pieces] = starts + k * piece
            at += len(rows) * n_pieces
        size = len(index) * piece
        out = np.empty(size, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8, size)
        into = torch.from_numpy(out.reshape(len(index), piece))
        torch.index_select(self.pieces, 0, torch.from_numpy(index), out=into)
        return out


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
        check_path(path)
        check_choice("split", split, (*SPLITS, "all"))
        check_choice("target", target, tuple(TARGETS))
        check_flags(normalize=normalize, allow_remote=allow_remote)
        self.num_classes = check_whole("num_classes", num_classes, 1, 10_000)
        self.fields = check_fields(fields, INPUTS) or (("rgb",) if target == "depth" else ("rgb", "depth"))
        self.device = check_device(device)
        self.path = resolve_set(path)
        if not allow_remote:
            refuse_remote(self.path)
        self.path = unpacked(self.path)
        self.split, self.target, self.normalize = split, target, normalize
        self._open()
        if device is not None:
            self._all_parts()

    def __getstate__(self) -> dict[str, Any]:
        """Path and settings; a relative path as seen from here, as the pickle may be opened elsewhere."""
        state = {key: value for key, value in self.__dict__.items() if key not in OPENED}
        return {**state, "path": self._set.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
        if self.fingerprint != state["fingerprint"]:
            raise UserError(f"{self.path} was replaced by another set since this dataset was made. Make it again")

    def _open(self) -> None:
        """Read the manifest and the per-row columns; maps wait for the first row that is asked for."""
        self._set = open_set(self.path.absolute())  # maps are opened later, perhaps from another working directory
        self._mapped: Mapped | None = None
        self._parts: tuple[Tensor, ...] | None = None
        for field in filter(None, (*self.fields, TARGETS[self.target])):
            self._set.check_has(field)
        manifest, split = self._set.manifest, self._set.column("split")
        self.size, self.fingerprint = self._set.settings.size, str(manifest["fingerprint"])
        self.crop = self._set.settings.crop
        self._rows = np.arange(len(split)) if self.split == "all" else np.flatnonzero(split == SPLITS.index(self.split))
        if not len(self._rows):
            raise UserError(f"{self.path} has no {self.split} rows. Run: make convert with a .mat that has some")
        scene_classes(self.num_classes, manifest["names"]["scene_types"])  # refused with any target
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

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        position = range(len(self))[one_whole_number(index)]  # from the end too, and an IndexError beyond
        return tuple(part[0] for part in self.batch(np.array([position])))

    def __getitems__(self, indices: Any) -> list[tuple[Tensor, ...]]:
        """One gather for the whole batch, handed over as rows (views), as torch's default collate wants them."""
        return list(zip(*self.batch(indices), strict=True))

    def labels(self) -> np.ndarray:
        """[N] int64: the scene class of every row of the split."""
        if self.target != "scene":
            raise UserError("labels() is for target='scene'")
        return self._scene_ids[self._rows]

    def rows_of(self, indices: Any) -> np.ndarray:
        """Positions in the split [B] -> row numbers of the set. Raises TypeError for a mask or other numbers that are
        not whole, IndexError for positions that do not exist (those from the end are for `ds[-1]` alone)."""
        positions = whole_numbers(indices)
        if len(positions) and not (positions.min() >= 0 and positions.max() < len(self)):
            found = f"positions {positions.min()}..{positions.max()}"
            raise IndexError(f"{found} of {len(self)} rows: choose from 0 to {len(self) - 1}")
        return self._rows[positions.astype(np.int64)]

    def _map(self) -> Mapped:
        """The memory maps, opened on first use. Threads that come at once may each open them; each has all of its own,
        and one assignment, of a finished object, decides which are kept. So there is no lock that a fork could hold."""
        mapped = self._mapped
        if mapped is None:
            names = {*self.fields, TARGETS[self.target]} - {""}
            self._mapped = mapped = Mapped.of({field: self._set.shards(field) for field in names}, self.size)
        return mapped

    def _layout(self, n: int) -> Layout:
        """Of a stored batch of n rows. Depth is at most 32767 mm: as int16 it has the bits of the uint16 on disk."""
        plane = self.size, self.size
        inputs = [("u1", (n, 3, *plane)) if field == "rgb" else ("i2", (n, 1, *plane)) for field in self.fields]
        target = {"scene": ("i8", (n,)), "depth": ("f4", (n, 1, *plane))}.get(self.target, ("i8", (n, *plane)))
        return [(np.dtype(kind), shape) for kind, shape in (*inputs, target)]

    def fill(self, buffer: memoryview, indices: Any) -> Layout | None:
        """Gather a batch in `buffer`: its layout there; or None, where there is something to compute."""
        if self.normalize or self.device is not None:
            return None
        return self._fill(buffer, self.rows_of(indices))

    def _fill(self, buffer: memoryview, rows: np.ndarray) -> Layout:
        use_one_thread_in_a_fork()
        mapped, layout = self._map(), self._layout(len(rows))
        target = arrays_in(buffer, layout)[-1]  # no part is wider: it lies first
        if field := TARGETS[self.target]:
            stored = mapped.gather((field,), rows).view(FIELDS[field]["dtype"]).reshape(target.shape)
            stored = self._lut[stored] if field == "label" else stored
            target[:] = stored / np.float32(1000) if field == "depth" else stored
        else:
            target[:] = self._scene_ids[rows]
        mapped.gather(self.fields, rows, buffer[target.nbytes :])
        return layout

    def stored(self, indices: Any) -> tuple[Tensor, ...]:
        """`batch` before normalising."""
        if self.device is None:
            return self._gathered(self.rows_of(indices))
        self.rows_of(indices)  # they exist
        parts = self._all_parts()
        index = torch.from_numpy(whole_numbers(indices).astype(np.int64)).to(parts[0].device)
        return tuple(part.index_select(0, index) for part in parts)

    def _gathered(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        buffer = private_memory(n_bytes_of(self._layout(len(rows))))
        return tensors_in(buffer, self._fill(buffer, rows))

    def _all_parts(self) -> tuple[Tensor, ...]:
        """All rows on the device; taken there on first use."""
        parts = self._parts
        if parts is None:
            self._parts = parts = tuple(part.to(self.device) for part in self._gathered(self._rows))
        return parts

    def batch(self, indices: Any) -> tuple[Tensor, ...]:
        """The fields asked for, as float32 inputs where `normalize`, then the target, of these positions [B]."""
        use_one_thread_in_a_fork()
        *inputs, target = self.stored(indices)
        if self.normalize:
            stats, pairs = (self.depth_mean, self.depth_std), zip(self.fields, inputs, strict=True)
            inputs = [normalize_rgb(part) if field == "rgb" else normalize_depth(part, *stats) for field, part in pairs]
        return (*inputs, target)


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
    batch_size = check_whole("batch_size", batch_size, 1, 2**31)
    workers = check_workers(num_workers)
    seed = check_whole("seed", seed, 0, 2**64 - 1)
    world = check_whole("world", world, 1, 2**31)
    rank = check_whole("rank", rank, 0, world - 1)
    check_target_size(target_size)
    check_flags(normalize=normalize, prefetch=prefetch, allow_remote=allow_remote)
    check_function("transform", transform)
    check_function("val_transform", val_transform)
    check_start_method(start_method)
    check_cache(cache, device)
    chosen: dict[str, Any] = {"target": target, "num_classes": num_classes, "normalize": normalize, "fields": fields}

    def loader(split: str, change: Transform | None, place: Any = None) -> Loader:
        dataset = ShardDataset(dataset_path, split=split, device=place, allow_remote=allow_remote, **chosen)
        have = dataset.size
        if target_size is not None and not set(np.ravel(target_size).tolist()) <= {have}:
            hint = f"Run: make convert ARGS='--size {np.min(target_size)}'"
            raise UserError(f"{dataset.path} is {have}x{have}, not {target_size}. {hint}")
        if split == "train" and len(dataset) < world:
            raise UserError(f"{dataset.path} has {len(dataset)} train rows for world {world}: choose a smaller world")
        maker = BatchMaker(dataset=dataset, transform=change, seed=0)
        count = 0 if place is not None else worker_count(workers, maker, batch_size, len(dataset), split)
        batches = Batches(len(dataset), batch_size, seed if split == "train" else None, rank, world)
        ahead = prefetch and place is None
        return Loader(dataset, batches, count, start_method, prefetch=ahead, transform=change, seed=seed)

    place = device if device is not None or cache is None else "cuda" if torch.cuda.is_available() else "cpu"
    return loader("train", transform, place), loader("test", val_transform)
