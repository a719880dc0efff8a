"""The dataset and its loaders: memory maps opened lazily in each process, one gather a field a batch.

    from train.data import ShardDataset, create_dataloaders
    train_loader, val_loader = create_dataloaders("data", batch_size=128)

A batch is the fields asked for, then the target; by default (rgb, depth, label). `normalize=False` hands over what is
stored (uint8 rgb, int16 millimetres, int64 target), to be converted on the device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convert.format import MANIFEST, SPLITS, VOID, ShardSet, UserError, open_set, read_manifest, resolve_set
from train.loader import Batches, DeviceLoader, Loader

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
MOST_AUTO_WORKERS = 4


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


def fields_for(target: str, fields: tuple[str, ...] | None) -> tuple[str, ...]:
    """The input fields: as asked for, else (rgb, depth), or rgb alone where depth is what is to be predicted."""
    return fields if fields is not None else ("rgb",) if target == "depth" else ("rgb", "depth")


class ShardDataset(Dataset[tuple[Tensor, ...]]):
    """Rows of one split of a converted set.

    `ds[i]` is (rgb [3,H,W], depth [1,H,W], target); `batch(indices)` the same with a leading batch axis.
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
        self.fields = fields_for(target, fields)
        if not set(self.fields) <= set(INPUTS):
            raise UserError(f"fields {self.fields}: choose from {', '.join(INPUTS)}")
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        """Read the manifest and the per-row columns; maps wait for the first row that is asked for."""
        self._set: ShardSet = open_set(self.path)
        manifest = self._set.manifest
        split = self._set.column("split")
        self._rows = np.arange(len(split)) if self.split == "all" else np.flatnonzero(split == SPLITS.index(self.split))
        if not len(self._rows):
            raise UserError(f"{self.path} has no {self.split} rows. Run: make convert with a .mat that has some")
        self._rows_per_shard = int(manifest["settings"]["rows_per_shard"])
        self._maps: dict[str, list[np.ndarray]] = {}
        self.classes = self._class_names(manifest["names"])
        types = manifest["names"]["scene_types"]
        self._scene_ids = self._scene_lookup(types)[self._set.column("scene_type")] if self.target == "scene" else None
        self._lut = self._label_lookup(manifest["names"])

    def _class_names(self, names: dict[str, Any]) -> list[str]:
        if self.target == "scene":
            return scene_classes(self.num_classes, names["scene_types"])
        kind = {"semantic13": "classes13", "semantic40": "classes40", "semantic894": "classes"}.get(self.target)
        return list(names[kind]) if kind else []

    def _scene_lookup(self, scene_types: list[str]) -> np.ndarray:
        """Stored scene type -> class id."""
        ids = {name: i for i, name in enumerate(self.classes)}
        return np.array([ids.get(name, len(ids) - 1) for name in scene_types], np.int64)

    def _label_lookup(self, names: dict[str, Any]) -> np.ndarray | None:
        """Stored label -> 0..K-1, void -> -100 (torch's ignore_index)."""
        if not self.target.startswith("semantic"):
            return None
        n_ids = len(names["classes"]) + 1
        key = {"semantic13": "to13", "semantic40": "to40"}.get(self.target)
        ids = np.array(names[key] if key else range(n_ids), np.int64)
        return np.where(ids > 0, ids - 1, VOID)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return tuple(t[0] for t in self.batch(np.array([index % len(self)])))

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        """One gather for the whole batch, handed over as rows (views), as torch's default collate wants them."""
        return list(zip(*self.batch(np.asarray(indices)), strict=True))

    @property
    def size(self) -> int:
        """Height and width of the stored pictures."""
        return self._set.size

    @property
    def fingerprint(self) -> str:
        return str(self._set.manifest["fingerprint"])

    @property
    def depth_mean(self) -> float:
        """Metres, over the valid pixels of the train rows."""
        return self._depth_statistics()[0]

    @property
    def depth_std(self) -> float:
        return self._depth_statistics()[1]

    def _depth_statistics(self) -> tuple[float, float]:
        statistics = self._set.manifest["fields"]["depth"]["statistics"]
        if statistics is None:
            raise UserError(f"{self.path} has no train rows to take depth statistics from. Run: make convert")
        return statistics["mean"][0] / 1000, max(statistics["std"][0] / 1000, 1e-6)

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

    def shards(self, field: str) -> list[np.ndarray]:
        """The field's memory maps, opened on first use in this process."""
        if field not in self._maps:
            self._maps[field] = [np.asarray(shard) for shard in self._set.shards(field)]  # memmap's slices are slow
        return self._maps[field]

    def gather(self, field: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy stored rows of `field` into `out`. `rows` are row numbers of the set, already range-checked."""
        shards, step = self.shards(field), self._rows_per_shard
        if np.all(rows[1:] >= rows[:-1]):
            cuts = np.searchsorted(rows, np.arange(1, len(shards)) * step)
            bounds = [0, *cuts.tolist(), len(rows)]
            for k, (a, b) in enumerate(pairwise(bounds)):
                if b > a:  # without mode="clip" numpy buffers the output, at a third of the speed
                    np.take(shards[k], rows[a:b] - k * step, axis=0, out=out[a:b], mode="clip")
        else:
            for i, row in enumerate(rows.tolist()):
                out[i] = shards[row // step][row % step]

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Positions in the split -> row numbers of the set; a bad one is an IndexError."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"positions {indices.min()}..{indices.max()} of {len(self)} rows")
        return self._rows[indices]

    @property
    def is_stored(self) -> bool:
        """Whether a batch is bytes of the shards and scene ids, with nothing to compute."""
        return not self.normalize and self._scene_ids is not None

    def layout(self, n_rows: int) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
        """(dtype, shape) of every part of a batch of `n_rows` as stored, the scene ids last."""
        side = self.size
        parts = {"rgb": (np.dtype(np.uint8), (n_rows, 3, side, side))}
        depth = (np.dtype(np.int16), (n_rows, 1, side, side))  # at most 32767 mm: the same bits as the uint16 on disk
        return [*(parts.get(field, depth) for field in self.fields), (np.dtype(np.int64), (n_rows,))]

    def fill(self, indices: np.ndarray, parts: list[np.ndarray]) -> None:
        """Gather a stored batch into arrays of that `layout`."""
        rows = self.rows_of(indices)
        assert self._scene_ids is not None
        np.take(self._scene_ids, rows, out=parts[-1], mode="clip")
        for field, part in zip(self.fields, parts, strict=False):
            self.gather(field, rows, part if field == "rgb" else part[:, 0].view(np.uint16))

    def batch(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """The fields asked for, then the target, each one fresh tensor."""
        batch = self.stored(indices)
        return self.normalized(batch) if self.normalize else batch

    def stored(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """`batch` before normalising."""
        rows = self.rows_of(indices)
        return (*(self._input(field, rows) for field in self.fields), self._target(rows))

    def normalized(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A stored batch, on any device, as float32 inputs; the target as it is."""
        inputs = [
            normalize_rgb(part) if field == "rgb" else normalize_depth(part, self.depth_mean, self.depth_std)
            for field, part in zip(self.fields, batch, strict=False)
        ]
        return (*inputs, batch[-1])

    def _stored(self, field: str, rows: np.ndarray) -> np.ndarray:
        shard = self.shards(field)[0]
        out = np.empty((len(rows), *shard.shape[1:]), shard.dtype)
        self.gather(field, rows, out)
        return out

    def _input(self, field: str, rows: np.ndarray) -> Tensor:
        stored = self._stored(field, rows)
        return torch.from_numpy(stored) if field == "rgb" else torch.from_numpy(stored.view(np.int16))[:, None]

    def _target(self, rows: np.ndarray) -> Tensor:
        if self._scene_ids is not None:
            return torch.from_numpy(self._scene_ids[rows])
        if self.target == "depth":
            return torch.from_numpy(self._stored("depth", rows).astype(np.float32) / np.float32(1000))[:, None]
        if self._lut is not None:
            return torch.from_numpy(self._lut[self._stored("label", rows)])
        return torch.from_numpy(self._stored("instance", rows).astype(np.int64))


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
) -> tuple[Loader | DeviceLoader, Loader]:
    """(train_loader, val_loader) over the official split of a converted set.

    dataset_path: a finished set or a ROOT that holds exactly one. num_workers: 0 gathers in one thread (in the caller
    with prefetch=False), "auto" is 0 unless there is a transform. target_size: None, or the set's own size.
    transform, val_transform: batch -> batch, run in the workers. cache="device": the train rows stay on `device`.
    allow_remote: read a set on a FUSE mount all the same. Raises UserError for a wrong setting.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: at least 1. Run: python -m train --batch-size 128")
    if cache not in (None, "device"):
        raise UserError(f"cache {cache!r}: 'device' or None")
    settings: dict[str, Any] = {"target": target, "num_classes": num_classes, "normalize": normalize}
    settings |= {"fields": fields, "allow_remote": allow_remote}
    loaders: list[Any] = []
    for split, change in zip(SPLITS, (transform, val_transform), strict=True):
        dataset = ShardDataset(dataset_path, split=split, **settings)
        _check_size(dataset, target_size)
        batches = Batches(len(dataset), batch_size, seed if split == "train" else None, rank, world)
        if cache and split == "train":
            loaders.append(DeviceLoader(dataset, batches, device, change))
        else:
            workers = _worker_count(num_workers, split, change is not None)
            loaders.append(Loader(dataset, batches, workers, start_method, prefetch=prefetch, transform=change))
    return loaders[0], loaders[1]


def _worker_count(num_workers: int | str, split: str, has_transform: bool) -> int:
    if num_workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count, why = (min(cores, MOST_AUTO_WORKERS), f"a transform to run, {cores} cores") if has_transform else (
            0, "rows are only copied, which one prefetch thread does at the speed of memory")  # fmt: skip
        print(f"loader: {split}: num_workers=auto is {count} ({why})", file=sys.stderr)
        return count
    try:
        count = int(num_workers)
    except ValueError:
        count = -1
    if not 0 <= count <= 64:
        raise UserError(f"num_workers {num_workers!r}: 'auto' or 0 to 64. Run: python -m train --num-workers auto")
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
            f"Run: make pull DRIVE={path.parent} (or insist with allow_remote=True)"
        )


def _check_size(dataset: ShardDataset, target_size: int | tuple[int, int] | None) -> None:
    have = dataset.size
    if target_size not in (None, have, (have, have), [have, have]):
        size = target_size[0] if isinstance(target_size, (tuple, list)) else target_size
        raise UserError(f"{dataset.path} is {have}x{have}, not {target_size}. Run: make convert ARGS='--size {size}'")
