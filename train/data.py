"""The dataset and its loaders: memory maps opened lazily in each process, one gather a field a batch.

    from train.data import ShardDataset, create_dataloaders
    train_loader, val_loader = create_dataloaders("data", batch_size=128)

A batch is the fields asked for, then the target; by default (rgb, depth, label). `normalize=False` hands over what is
stored (uint8 rgb, int16 millimetres, int64 target), to be converted on the device.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convert.format import MANIFEST, SPLITS, VOID, ShardSet, UserError, open_set, read_manifest, resolve_set
from train.loader import Loader, Maker
from train.order import Batches
from train.ring import N_SLOTS, Layout, arrays_in, n_bytes_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SCENE_10 = [
    "bedroom", "kitchen", "living_room", "bathroom", "dining_room", "office", "home_office", "classroom", "bookstore",
]  # fmt: skip
SCENE_13 = [*SCENE_10, "playroom", "study", "reception_room"]
Transform = Callable[[tuple[Tensor, ...]], Any]
TARGETS = ("scene", "semantic13", "semantic40", "semantic894", "depth", "instance")
INPUTS = ("rgb", "depth", "raw_depth")
MOUNTS = Path("/proc/self/mountinfo")
HIDDEN_MS = 10  # a batch made by one thread in less than this is ready before any training step ends


def scene_classes(num_classes: int, scene_types: list[str]) -> list[str]:
    """The scene class names in id order: 27 as stored, 10 and 13 with `others` last."""
    if num_classes == 10:
        return [*SCENE_10, "others"]
    if num_classes == 13:
        return [*SCENE_13, "others"]
    if num_classes == len(scene_types):
        return list(scene_types)
    raise UserError(
        f"num_classes {num_classes}: choose 10, 13 or {len(scene_types)}. Run: python -m train --num-classes 13"
    )


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
            raise UserError(
                f"split {split!r}, target {target!r}: choose from train, test, all and {', '.join(TARGETS)}"
            )
        self.path = resolve_set(path)
        if not allow_remote:
            refuse_remote(self.path)
        self.path = unpacked(self.path)
        self.split, self.target, self.num_classes, self.normalize = split, target, num_classes, normalize
        self.fields = fields if fields is not None else ("rgb",) if target == "depth" else ("rgb", "depth")
        if not set(self.fields) <= set(INPUTS):
            raise UserError(f"fields {self.fields}: choose from {', '.join(INPUTS)}")
        self._open()
        if device is not None:
            chunks = [self.stored(np.arange(a, min(a + 128, len(self)))) for a in range(0, len(self), 128)]
            self._parts = [torch.cat([c.to(device) for c in parts]) for parts in zip(*chunks, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        """Read the manifest and the per-row columns; maps wait for the first row that is asked for."""
        self._set: ShardSet = open_set(self.path)
        manifest = self._set.manifest
        self.size, self.fingerprint = self._set.size, str(manifest["fingerprint"])
        split = self._set.column("split")
        self._rows = np.arange(len(split)) if self.split == "all" else np.flatnonzero(split == SPLITS.index(self.split))
        if not len(self._rows):
            raise UserError(f"{self.path} has no {self.split} rows. Run: make convert with a .mat that has some")
        self._step = int(manifest["settings"]["rows_per_shard"])
        self._maps: dict[str, list[np.ndarray]] = {}
        self._parts = list[Tensor]()
        self._read_names(manifest["names"])
        statistics = manifest["fields"].get("depth", {}).get("statistics") or {"mean": [math.nan], "std": [math.nan]}
        self.depth_mean, self.depth_std = statistics["mean"][0] / 1000, max(statistics["std"][0] / 1000, 1e-6)
        if self.normalize and not self.depth_mean >= 0:
            raise UserError(f"{self.path} has no train rows with depth to take statistics from. Run: make convert")

    def _read_names(self, names: dict[str, Any]) -> None:
        """The classes, and what turns a stored scene type or label into one: void is -100, torch's ignore_index."""
        self.classes: list[str] = []
        self._scene_ids: np.ndarray | None = None
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

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return tuple(t[0] for t in self.batch(np.array([index % len(self)])))

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        """One gather for the whole batch, handed over as rows (views), as torch's default collate wants them."""
        return list(zip(*self.batch(np.asarray(indices)), strict=True))

    def labels(self) -> np.ndarray:
        """[N] int64: the scene class of every row of the split."""
        if self._scene_ids is None:
            raise UserError("labels() is for target='scene'")
        return self._scene_ids[self._rows]

    def describe(self, index: int) -> str:
        """The row as a caption: number in the .mat, scene."""
        row = int(self._rows[index])
        return f"row {row}: {self._set.manifest['names']['scenes'][self._set.column('scene')[row]]}"

    # ------------------------------------------------------------ gathering

    def _map(self) -> None:
        """Open the memory maps: on first use in each process.

        Seen as pieces of rows at any address between the first map and the end of the last, all shards and fields are
        one table, and a batch is one index_select, which lets other threads run meanwhile. Below 32768 elements torch
        divides the pieces among its threads, above that every single piece.
        """
        extra = () if self.target == "scene" else (self.target if self.target in ("depth", "instance") else "label",)
        self._maps = {field: self._set.shards(field) for field in {*self.fields, *extra}}
        maps = [shard for shards in self._maps.values() for shard in shards]
        self._starts = {f: np.array([shard.ctypes.data for shard in shards]) for f, shards in self._maps.items()}
        self._low = min(int(starts.min()) for starts in self._starts.values())
        n_bytes = max(shard.ctypes.data + shard.nbytes for shard in maps) - self._low
        piece = self.size * max(d for d in range(1, self.size + 1) if self.size % d == 0 and self.size * d < 32768)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(self._low))
        self._pieces = torch.from_numpy(memory).as_strided((n_bytes - piece + 1, piece), (1, 1))

    def _gather(self, fields: tuple[str, ...], rows: np.ndarray, buffer: Any = None) -> list[np.ndarray]:
        """Range-checked rows of each field, in `buffer` as `arrays_in` lays them out, or in new memory."""
        if not self._maps:
            self._map()
        one = {field: self._maps[field][0][:1] for field in fields}
        layout: Layout = [(one[field].dtype, (len(rows), *one[field].shape[1:])) for field in fields]
        buffer = np.empty(n_bytes_of(layout), np.uint8).data if buffer is None else buffer
        picks = []
        for field in sorted(fields, key=lambda field: -one[field].itemsize):
            starts = self._starts[field][rows // self._step] + rows % self._step * one[field].nbytes - self._low
            picks.append(starts[:, None] + np.arange(0, one[field].nbytes, self._pieces.shape[1]))
        index = torch.from_numpy(np.concatenate(picks, axis=None))
        out = torch.from_numpy(np.frombuffer(buffer, np.uint8, n_bytes_of(layout))).view(len(index), -1)
        torch.index_select(self._pieces, 0, index, out=out)
        return arrays_in(buffer, layout)

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Positions in the split -> row numbers of the set; a bad one is an IndexError."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"positions {indices.min()}..{indices.max()} of {len(self)} rows")
        return self._rows[indices]

    @property
    def is_stored(self) -> bool:
        """Whether a batch is bytes of the shards and scene ids, with nothing to compute."""
        return not self.normalize and self._scene_ids is not None and not self._parts

    def fill(self, buffer: memoryview, indices: np.ndarray) -> Layout:
        """Gather a stored batch into `buffer`; what lies there is the layout returned."""
        rows, n = self.rows_of(indices), len(indices)
        assert self._scene_ids is not None
        np.frombuffer(buffer, np.int64, n)[:] = self._scene_ids[rows]
        self._gather(self.fields, rows, buffer[8 * n :])
        side, u1, i2 = self.size, np.dtype(np.uint8), np.dtype(np.int16)
        inputs = [(u1, (n, 3, side, side)) if field == "rgb" else (i2, (n, 1, side, side)) for field in self.fields]
        return [*inputs, (np.dtype(np.int64), (n,))]

    def batch(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """The fields asked for, then the target."""
        batch = self.stored(indices)
        return self.normalized(batch) if self.normalize else batch

    def stored(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """`batch` before normalising. Depth is at most 32767 mm: the same bits as the uint16 on disk."""
        rows = self.rows_of(indices)
        if self._parts:
            index = torch.as_tensor(indices, device=self._parts[0].device)
            return tuple(part.index_select(0, index) for part in self._parts)
        found = self._gather(self.fields, rows)
        inputs = [torch.from_numpy(a) if a.ndim == 4 else torch.from_numpy(a.view(np.int16))[:, None] for a in found]
        return (*inputs, torch.from_numpy(self._target(rows)))

    def _target(self, rows: np.ndarray) -> np.ndarray:
        if self._scene_ids is not None:
            return self._scene_ids[rows]
        if self.target == "depth":
            return self._gather(("depth",), rows)[0][:, None].astype(np.float32) / np.float32(1000)
        if self.target == "instance":
            return self._gather(("instance",), rows)[0].astype(np.int64)
        return self._lut[self._gather(("label",), rows)[0]]

    def normalized(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A stored batch, on any device, as float32 inputs; the target as it is."""
        inputs = [
            normalize_rgb(part) if field == "rgb" else normalize_depth(part, self.depth_mean, self.depth_std)
            for field, part in zip(self.fields, batch, strict=False)
        ]
        return (*inputs, batch[-1])


def unpacked(path: Path) -> Path:
    """The set; of a compressed one the .npy copy beside it, made once, by `convert`: zarr is never loaded here."""
    if path.suffix != ".zarr" or set(read_manifest(path)["codecs"].values()) == {"none"}:
        return path
    copy = path.with_suffix("")
    if not (copy / MANIFEST).is_file():
        print(f"{path} is compressed: unpacking it once, into {copy}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "convert", "run", str(path), "--out", str(path.parent)]
        here = str(Path(__file__).resolve().parents[1])
        made = subprocess.run(command, env={**os.environ, "PYTHONPATH": here}, stdout=subprocess.DEVNULL)
        if made.returncode:
            raise UserError(f"{path} could not be unpacked. Run: {' '.join(['python', *command[1:]])}")
    return copy


def normalize_rgb(rgb_bchw: Tensor) -> Tensor:
    """uint8 [B,3,H,W] -> float32, ImageNet mean and standard deviation."""
    scale = torch.tensor([1 / (255 * s) for s in IMAGENET_STD], device=rgb_bchw.device)[:, None, None]
    shift = torch.tensor([m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)], device=rgb_bchw.device)
    return rgb_bchw * scale - shift[:, None, None]


def normalize_depth(depth_b1hw: Tensor, mean_m: float, std_m: float) -> Tensor:
    """int16 millimetres [B,1,H,W] -> float32 (metres - mean) / std; a pixel without a measurement is exactly 0."""
    metres = depth_b1hw * 1e-3
    return torch.where(depth_b1hw > 0, (metres - mean_m) / std_m, 0.0)


# ---------------------------------------------------------------- loaders


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
    if cache not in (None, "device"):
        raise UserError(f"cache {cache!r}: 'device' or None")
    settings: dict[str, Any] = {"target": target, "num_classes": num_classes, "normalize": normalize}
    settings |= {"fields": fields, "allow_remote": allow_remote}
    loaders = []
    for split, change in zip(SPLITS, (transform, val_transform), strict=True):
        is_train = split == "train"
        place = (device or ("cuda" if torch.cuda.is_available() else "cpu")) if cache and is_train else None
        dataset = ShardDataset(dataset_path, split=split, device=place, **settings)
        _check_size(dataset, target_size)
        workers = 0 if place else _worker_count(num_workers, Maker(dataset, change, seed), batch_size)
        batches = Batches(len(dataset), batch_size, seed if is_train else None, rank, world)
        how: dict[str, Any] = {"prefetch": prefetch and place is None, "transform": change}
        loaders.append(Loader(dataset, batches, workers, start_method, **how))
    return loaders[0], loaders[1]


def _worker_count(num_workers: int | str, make: Maker, batch_size: int) -> int:
    if num_workers != "auto":
        if not str(num_workers).isdecimal() or int(num_workers) > 64:
            raise UserError(f"num_workers {num_workers!r}: 'auto' or 0 to 64. Run: python -m train --num-workers auto")
        return int(num_workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_rows = min(batch_size, len(make.dataset), 16)
    buffer = np.empty(make.slot_bytes(n_rows)[0], np.uint8).data
    for _ in range(2):  # the second is not the first to touch anything
        started = time.perf_counter()
        make(buffer, (0, 0, np.arange(n_rows)))
    ms = (time.perf_counter() - started) * 1e3 * batch_size / n_rows
    count = 0 if ms <= HIDDEN_MS else min(cores, N_SLOTS - 1) if cores > 1 else 0
    why = f"a batch takes {ms:.1f} ms to make, {cores} cores"
    print(f"loader: {make.dataset.split}: num_workers=auto is {count} ({why})", file=sys.stderr)
    return count


def refuse_remote(path: Path) -> None:
    """Raise UserError for a set on a FUSE mount (Google Drive): each page would be a request over the network."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:  # no /proc: not a Linux machine
        return
    resolved, kind_at = path.resolve(), {}
    for words in (line.split(" ") for line in lines):
        point = Path(words[4].encode().decode("unicode_escape"))  # a space is written \040
        kind_at[point] = words[words.index("-") + 1]
    kind = next((kind_at[p] for p in (resolved, *resolved.parents) if p in kind_at), "")
    if kind.startswith("fuse"):
        raise UserError(
            f"{path} is on a mounted Drive ({kind}): training would read it over the network, row by row. "
            f"Run: make pull DRIVE={path.parent} (or insist: --allow-remote)"
        )


def _check_size(dataset: ShardDataset, target_size: int | tuple[int, int] | None) -> None:
    have = dataset.size
    if target_size not in (None, have, (have, have), [have, have]):
        size = target_size[0] if isinstance(target_size, (tuple, list)) else target_size
        raise UserError(f"{dataset.path} is {have}x{have}, not {target_size}. Run: make convert ARGS='--size {size}'")
