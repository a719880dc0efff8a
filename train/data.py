"""The dataset and its loaders: memory maps opened lazily in each process, one gather a batch.

A batch is the fields asked for, then the targets; by default (rgb, depth, label). `normalize=False`
hands over what is stored (uint8 rgb, int16 millimetres, int64 target), to be converted on the
device.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from loader.buffers import arrays_in, n_bytes_of, private_memory, tensors_in
from loader.forks import use_one_thread_in_a_fork
from loader.loader import (
    BatchMaker,
    BatchOrder,
    Loader,
    Transform,
    worker_count,
    workers_unmeasured,
)
from loader.messages import Layout
from shards.dataset import ShardSet, open_set
from shards.errors import MissingSet, UserError, WrongSetting
from shards.files import log
from shards.gather import RowGather
from shards.readahead import RowsAhead
from shards.spec import SPLITS, Box, Camera, Field
from stores.cached_set import CachedAddress, CachedSet
from train.arguments import (
    check_cache,
    check_choice,
    check_device,
    check_fields,
    check_flags,
    check_function,
    check_limit,
    check_num_classes,
    check_start_method,
    check_target,
    check_target_size,
    check_whole,
    check_workers,
    one_whole_number,
    whole_numbers,
)
from train.augment import SMALLEST_STD, normalize_depth, normalize_levels, normalize_rgb
from train.caching import Reading, cached_parts, orders_of, with_feed
from train.feeding import FedBatches
from train.joined import join, parts_of
from train.opening import DatasetPath, open_for_training
from train.room import shuffle_named
from train.split_rows import SplitRows, check_split, evaluation_split, read_split, target_of
from train.torch_words import TorchWords, check_torch_words

# How a stored field is handed over, by its kind. Depth is at most 32767 mm: as int16 it has the
# bits of the uint16 on disk, and torch computes with it.
INPUT_DTYPES = {"colour": "u1", "grey": "u1", "grey16": "u2", "depth": "i2", "camera": "f4"}
# A column that is handed over like a field: [B, 4] focal lengths and centre of each row's camera,
# as shares of the stored picture, 0 where not known.
CAMERA = Field(
    name="camera",
    kind="camera",
    dtype="<f4",
    planes=(4,),
    unit="share of the picture",
    invalid=0,
    resampling="none",
)
Part = TypeVar("Part")  # of a batch: an array, a tensor, or what a layout says of it
OPENED = {"_set", "_split_rows", "_gather", "_ahead", "_parts"}  # what a pickle leaves behind


class ShardDataset(Dataset[tuple[Tensor, ...]]):
    """Rows of one split of a converted set.

    `ds[i]` is (rgb [3,H,W], depth [1,H,W], target); `batch(indices)` the same with a leading batch
    axis.

    path: a finished set, a folder that holds exactly one, an opened one, or a list of such: sets of
    one size, whose classes are joined by name. split: train, val, test or all. fields: names of
    colour, grey or depth fields, and "camera" for that of each row, [B,4]: focal lengths and centre
    as shares of the stored picture, 0 where unknown. target: scene, semantic, semanticN, depth or
    instance; a tuple of these: one part of a batch each. num_classes: which scene classes; None:
    the dataset's default. device: all rows are kept there as tensors (250 KB a row at 224), and so
    are batches. Pickles its path and settings only; everything else is reopened where it lands.
    Raises UserError for a set that is damaged, lacks a field, or has no row in the split.
    """

    def __init__(
        self,
        path: DatasetPath,
        *,
        split: str = "train",
        fields: tuple[str, ...] | None = None,
        target: str | tuple[str, ...] = "scene",
        num_classes: int | None = None,
        normalize: bool = False,
        device: str | torch.device | None = None,
        allow_remote: bool = False,
    ) -> None:
        check_choice("split", split, (*SPLITS, "all"))
        self.targets = check_target(target)
        check_flags(normalize=normalize, allow_remote=allow_remote)
        check_num_classes(num_classes)
        self.num_classes = num_classes
        self.device = check_device(device)
        self.split = split
        self.target = target
        self.normalize = normalize
        self._set = open_for_training(path, allow_remote=allow_remote)
        if device is not None and cached_parts(self._set):
            what = "for a set that lies on this machine: copy it here first"
            raise WrongSetting("device", device, what)
        self.path = self._set.address
        self._places = tuple(_place_of(part) for part in parts_of(self._set))
        self.size = self._set.settings.size
        self.crop = self._set.settings.crop
        self.fingerprint = self._set.manifest.fingerprint
        self.depth_mean, self.depth_std = depth_statistics(self._set)
        inputs = [name for name, each in self._set.manifest.fields.items() if each.kind != "id"]
        if CAMERA.name in self._set.manifest.columns and CAMERA.name not in inputs:
            inputs.append(CAMERA.name)
        default = ("rgb",) if "depth" in self.targets else ("rgb", "depth")
        self.fields = check_fields(fields, inputs) or default
        self._kept: np.ndarray | None = None  # positions in the split, of a subset
        self._gather: RowGather | None = None
        self._ahead: RowsAhead | None = None
        self._parts: tuple[Tensor, ...] | None = None
        check_split(self._set, split)
        self._split_rows = self._read_split()
        self._say_what_is_left_out()
        self._input_fields = [self._field(name) for name in self.fields]
        if not self._stored_fields():
            raise WrongSetting("fields", repr(fields), "name a field of pictures too")
        self._check_statistics()
        if device is not None:
            self._all_parts()

    def _field(self, name: str) -> Field:
        """Raises MissingField."""
        is_stored = name in self._set.manifest.fields
        return CAMERA if name == CAMERA.name and not is_stored else self._set.field(name)

    # ------------------------------------------------------------------ opened where it is used

    def __getstate__(self) -> dict[str, Any]:
        """Path and settings; the path is absolute, as the pickle may be opened elsewhere."""
        return {key: value for key, value in self.__dict__.items() if key not in OPENED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        opened = [_opened_again(place) for place in self._places]
        self._set = opened[0] if len(opened) == 1 else join(opened)
        if self._set.manifest.fingerprint != self.fingerprint:
            what = "was replaced by another set since this dataset was made"
            raise MissingSet(self.path, what, "Make it again")
        self._gather = None
        self._ahead = None
        self._parts = None
        self._split_rows = self._read_split()

    def _read_split(self) -> SplitRows:
        """The columns of its rows; maps wait for the first row that is asked for."""
        sees_cameras = CAMERA in [self._field(name) for name in self.fields]
        found = read_split(self._set, self.split, self.targets, self.num_classes)
        if sees_cameras:
            found = replace(found, cameras=self._set.column(CAMERA.name))
        return found if self._kept is None else replace(found, rows=found.rows[self._kept])

    def _check_statistics(self) -> None:
        """Raise MissingSet where depth is to be normalised and the set does not say by what."""
        sees_depth = any(field.kind == "depth" for field in self._input_fields)
        if self.normalize and sees_depth and not self.depth_mean >= 0:
            what = "has no train rows with depth to take statistics from"
            raise MissingSet(self.path, what, "Convert a source that has some")

    def _say_what_is_left_out(self) -> None:
        """Once: not where it is remade from a pickle, as in each worker."""
        n_left_out = self._split_rows.n_without_class
        if n_left_out:
            what = f"{n_left_out} of {n_left_out + len(self)} {self.split} rows have no class"
            log(f"{self.path}: {what}: left out")

    def wait_for_shards_of(self, feed: int) -> None:
        """Of a cached set: what is read from now on waits for shards that whoever has this number
        has fetched (see train.feeding).
        """
        self._set = with_feed(self._set, feed)
        self._places = tuple(_place_of(part) for part in parts_of(self._set))
        self._gather = None
        self._ahead = None

    # ---------------------------------------------------------------------------- facts of rows

    def __repr__(self) -> str:
        return f"ShardDataset({str(self.path)!r}, split={self.split!r})"

    def __len__(self) -> int:
        return len(self._split_rows.rows)

    @property
    def shard_set(self) -> ShardSet:
        """The opened set."""
        return self._set

    @property
    def rows(self) -> np.ndarray:
        """[N] the numbers of these rows in the set."""
        return self._split_rows.rows

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of their ids; none where the target has no classes. Of several
        targets those of the first.
        """
        return self.classes_of(self.targets[0])

    def classes_of(self, target: str) -> list[str]:
        """Of one of `targets`."""
        return list(self._split_rows.targets[self.targets.index(target)].names)

    @property
    def camera(self) -> Camera | None:
        """Where it is one for all rows; in pixels of the whole picture."""
        return self._set.dataset.camera

    @property
    def crop_box(self) -> Box:
        """What is stored of each picture, in pixels of the whole one."""
        return self._set.dataset.crop_box(self.crop)

    def row_facts(self, column: str) -> np.ndarray:
        """[N, ...] one value a row of the split, such as its "scene"."""
        return self._set.column(column)[self._split_rows.rows]

    def labels(self) -> np.ndarray:
        """[N] int64: the scene class of every row of the split."""
        if "scene" not in self.targets:
            raise UserError("labels() is for target='scene'")
        scenes = self._split_rows.targets[self.targets.index("scene")]
        return scenes.scene_ids[self._split_rows.rows]

    def subset(self, positions: np.ndarray) -> "ShardDataset":
        """A dataset of some of these rows, by their positions [M] or by a mask [N]."""
        chosen = np.arange(len(self))[positions]
        before = np.arange(len(self)) if self._kept is None else self._kept
        made = ShardDataset.__new__(ShardDataset)
        made.__setstate__({**self.__getstate__(), "_kept": before[chosen]})
        return made

    def rows_of(self, indices: Any) -> np.ndarray:
        """Positions in the split [B] -> row numbers of the set.

        Raises TypeError for a mask or numbers that are not whole, IndexError for positions that do
        not exist (those from the end are for `ds[-1]` alone).
        """
        positions = whole_numbers(indices)
        if len(positions) and not (positions.min() >= 0 and positions.max() < len(self)):
            found = f"positions {positions.min()}..{positions.max()}"
            raise IndexError(f"{found} of {len(self)} rows: choose from 0 to {len(self) - 1}")
        return self._split_rows.rows[positions.astype(np.int64)]

    # ---------------------------------------------------------------------------------- batches

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        # A range takes numbers from the end too, and raises IndexError beyond.
        position = range(len(self))[one_whole_number(index)]
        return tuple(part[0] for part in self.batch(np.array([position])))

    def __getitems__(self, indices: Any) -> list[tuple[Tensor, ...]]:
        """One gather for the whole batch, handed over as rows (views), as torch's default collate
        wants them.
        """
        return list(zip(*self.batch(indices), strict=True))

    def batch(self, indices: Any) -> tuple[Tensor, ...]:
        """The fields asked for, as float32 inputs where `normalize`, then the targets, of these
        positions [B].
        """
        use_one_thread_in_a_fork()
        if not self.normalize:
            return self.stored(indices)
        if self.device is None:
            rows = self.rows_of(indices)
            buffer = private_memory(n_bytes_of(self._normalized_layout(len(rows))))
            return tensors_in(buffer, self._fill_normalized(buffer, rows))
        inputs, targets = self._inputs_and_targets(self.stored(indices))
        pairs = zip(self._input_fields, inputs, strict=True)
        return (*(self._normalized(field, part) for field, part in pairs), *targets)

    def _normalized(self, field: Field, part: Tensor, out: Tensor | None = None) -> Tensor:
        if field.kind == "depth":
            return normalize_depth(part, self.depth_mean, self.depth_std, out)
        if field.kind == "camera":
            return part if out is None else out.copy_(part)
        if field.name == "rgb":
            return normalize_rgb(part, out)
        if field.statistics is None:
            raise UserError(
                f"{field.name} has no statistics to normalise by: the set has no train rows"
            )
        return normalize_levels(part, field.statistics.mean, field.statistics.std, out)

    def stored(self, indices: Any) -> tuple[Tensor, ...]:
        """`batch` before normalising."""
        if self.device is None:
            return self._gathered(self.rows_of(indices))
        self.rows_of(indices)  # they exist
        parts = self._all_parts()
        index = torch.from_numpy(whole_numbers(indices).astype(np.int64)).to(parts[0].device)
        return tuple(part.index_select(0, index) for part in parts)

    def fill(self, buffer: memoryview, indices: Any) -> Layout | None:
        """Write a batch into `buffer`: its layout there; None where the rows are on a device."""
        if self.device is not None:
            return None
        rows = self.rows_of(indices)
        return self._fill_normalized(buffer, rows) if self.normalize else self._fill(buffer, rows)

    def read_ahead(self, indices: Any) -> None:
        """Have the system begin to read these rows, for a `batch` or `fill` that comes later.

        It pays where they come from a disk; nothing else changes. Raises as `rows_of` does.
        """
        if self.device is not None:
            return
        rows = self.rows_of(indices)
        ahead = self._ahead
        if ahead is None:  # as in `_opened_gather`: several threads may each make one
            self._ahead = ahead = RowsAhead(self._opened_gather(), self.mapped_fields())
        ahead.ask_for(rows)

    def mapped_fields(self) -> list[str]:
        """Each once: what a batch is read from."""
        of_targets = [target_of(name).field for name in self.targets]
        return list(dict.fromkeys([*self._stored_fields(), *filter(None, of_targets)]))

    def _fill(self, buffer: memoryview, rows: np.ndarray) -> Layout:
        use_one_thread_in_a_fork()
        gather = self._opened_gather()
        layout = self._layout(len(rows))
        inputs, targets = self._inputs_and_targets(arrays_in(buffer, layout))
        start = 0
        for known, part in zip(self._split_rows.targets, targets, strict=True):
            known.fill(part, rows, self._set, gather)
            start += part.nbytes
        for field, part in zip(self._input_fields, inputs, strict=True):
            if field == CAMERA:
                part[:] = self._split_rows.cameras[rows]
                start += part.nbytes
        # The targets and the cameras lie first: nothing that is stored is as wide.
        gather.into(self._stored_fields(), rows, buffer[start:])
        return layout

    def _stored_fields(self) -> list[str]:
        return [field.name for field in self._input_fields if field != CAMERA]

    def _fill_normalized(self, buffer: memoryview, rows: np.ndarray) -> Layout:
        """No tensor of torch's own here: glibc before 2.38 rarely gives memory that was aligned for
        one to the next, and a process grew by a batch with every few batches.
        """
        layout = self._normalized_layout(len(rows))
        outs = [torch.from_numpy(array) for array in arrays_in(buffer, layout)]
        stored_layout = self._layout(len(rows))
        scratch = private_memory(n_bytes_of(stored_layout))
        self._fill(scratch, rows)
        stored = [torch.from_numpy(array) for array in arrays_in(scratch, stored_layout)]

        inputs, targets = self._inputs_and_targets(stored)
        input_outs, target_outs = self._inputs_and_targets(outs)
        for field, part, out in zip(self._input_fields, inputs, input_outs, strict=True):
            self._normalized(field, part, out)
        for part, out in zip(targets, target_outs, strict=True):
            out.copy_(part)
        return layout

    def _normalized_layout(self, n: int) -> Layout:
        inputs, targets = self._inputs_and_targets(self._layout(n))
        return [*((np.dtype("f4"), shape) for _, shape in inputs), *targets]

    def _inputs_and_targets(self, batch: Sequence[Part]) -> tuple[Sequence[Part], Sequence[Part]]:
        """The parts of a batch, one of each field and one of each target."""
        n_inputs = len(self.fields)
        return batch[:n_inputs], batch[n_inputs:]

    def _layout(self, n: int) -> Layout:
        """Of a stored batch of n rows."""
        plane = (self.size, self.size)
        parts: list[tuple[str, tuple[int, ...]]] = []
        for field in self._input_fields:
            planes = field.planes or (1,)
            shape = (n, *planes) if field == CAMERA else (n, *planes, *plane)
            parts.append((INPUT_DTYPES[field.kind], shape))
        parts += [known.part(n, self.size) for known in self._split_rows.targets]
        return [(np.dtype(dtype), shape) for dtype, shape in parts]

    def _opened_gather(self) -> RowGather:
        """The memory maps, opened on first use.

        Threads that come at once may each open them; each has all of its own, and one assignment,
        of a finished object, decides which are kept. So there is no lock that a fork could hold.
        """
        gather = self._gather
        if gather is None:
            self._gather = gather = self._set.gather(self.mapped_fields())
        return gather

    def _gathered(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        buffer = private_memory(n_bytes_of(self._layout(len(rows))))
        return tensors_in(buffer, self._fill(buffer, rows))

    def _all_parts(self) -> tuple[Tensor, ...]:
        """All rows on the device; taken there on first use."""
        parts = self._parts
        if parts is None:
            gathered = self._gathered(self._split_rows.rows)
            self._parts = parts = tuple(part.to(self.device) for part in gathered)
        return parts


def _place_of(part: ShardSet) -> Path | CachedAddress:
    """How a pickle tells where a set lies."""
    return part.reopened if isinstance(part, CachedSet) else part.path


def _opened_again(place: Path | CachedAddress) -> ShardSet:
    return place.opened() if isinstance(place, CachedAddress) else open_set(place)


def depth_statistics(found: ShardSet) -> tuple[float, float]:
    """Mean and standard deviation of depth in metres; nan where the set has none."""
    depth = found.manifest.fields.get("depth")
    if depth is None or depth.statistics is None:
        return math.nan, math.nan
    mean_m = depth.statistics.mean[0] / 1000
    std_m = depth.statistics.std[0] / 1000
    return mean_m, max(std_m, SMALLEST_STD)


def create_dataloaders(
    dataset_path: DatasetPath,
    *,
    batch_size: int = 128,
    num_workers: int | str = "auto",
    num_classes: int | None = None,
    target: str | tuple[str, ...] = "scene",
    normalize: bool = True,
    target_size: int | tuple[int, int] | None = None,
    eval_split: str = "auto",
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
    shuffle: str | bool | None = "auto",
    cache_dir: str | Path | None = None,
    cache_limit_gb: float | None = None,
    **torch_words: Unpack[TorchWords],
) -> tuple[Loader, Loader]:
    """(train_loader, val_loader) over the splits of a converted set.

    dataset_path: a finished set, a ROOT that holds exactly one, an opened set, or a list of such:
    several sets of one size are read as one, their classes joined by name.
    num_workers: 0 gathers in one thread (in the caller with prefetch=False), "auto" measures how
    long a batch takes to make. num_classes: which scene classes; None: the dataset's default.
    target: one, or a tuple of several, which end a batch in their order.
    target_size: None, or the set's own size. eval_split: train, val or test, for the second loader;
    "auto": val where the set has val rows, else test.
    transform, val_transform: batch -> batch, run in the workers. cache="device": the train rows
    stay on `device`. allow_remote: read a set on a mounted Drive all the same.
    shuffle: of the train rows: "full", all together; "wheel" (or "wheel:N"), those of N shards at a
    time; "auto", full where all that is read fits this machine. cache_dir: of a set that lies
    elsewhere, or on a disk far away: where shards are kept that come as they are needed; by default
    a folder of the user's. cache_limit_gb: of all that is kept there, in 10^9 bytes; None: 90 % of
    what the disk has.
    torch_words: what torch's DataLoader is given besides; what it asks for is so here in any case
    (pin_memory=True), or is refused with the word for it (collate_fn: transform).

    Raises UserError for a wrong setting, and for a set that cannot be read; TypeError for an
    argument that does not exist.
    """
    check_torch_words(torch_words, _own_arguments())
    batch_size = check_whole("batch_size", batch_size, 1, 2**31)
    workers = check_workers(num_workers)
    seed = check_whole("seed", seed, 0, 2**64 - 1)
    world = check_whole("world", world, 1, 2**31)
    rank = check_whole("rank", rank, 0, world - 1)
    check_choice("eval_split", eval_split, ("auto", *SPLITS))
    check_target_size(target_size)
    check_flags(normalize=normalize, prefetch=prefetch, allow_remote=allow_remote)
    check_function("transform", transform)
    check_function("val_transform", val_transform)
    check_start_method(start_method)
    check_cache(cache, device)
    shuffle = shuffle_named(shuffle)
    limit_gb = check_limit("cache_limit_gb", cache_limit_gb)

    found = open_for_training(dataset_path, allow_remote=allow_remote, cache_dir=cache_dir)
    _check_size(found, target_size)
    place = device
    if cache is not None and device is None:
        place = "cuda" if torch.cuda.is_available() else "cpu"

    def dataset_of(split: str, on: str | torch.device | None) -> ShardDataset:
        return ShardDataset(
            found,
            split=split,
            fields=fields,
            target=target,
            num_classes=num_classes,
            normalize=normalize,
            device=on,
        )

    def loader_of(
        dataset: ShardDataset, batches: BatchOrder, change: Transform | None, ahead: bool
    ) -> Loader:
        n_workers = 0
        if isinstance(batches, FedBatches) and workers == "auto":
            n_workers = workers_unmeasured(is_work=normalize or change is not None)
        elif dataset.device is None:
            maker = BatchMaker(dataset=dataset, transform=change, seed=0)
            n_workers = worker_count(workers, maker, batch_size, len(dataset), dataset.split)
        return Loader(
            dataset, batches, n_workers, start_method, prefetch=ahead, transform=change, seed=seed
        )

    train_set = dataset_of("train", place)
    if len(train_set) < world:
        what = f"has {len(train_set)} train rows for world {world}"
        raise WrongSetting("world", world, f"{found.address} {what}: choose a smaller one")
    val_split = evaluation_split(found, eval_split)
    if eval_split == "auto":
        log(f"evaluation: on the {val_split} rows")
    val_set = dataset_of(val_split, None)
    reading = Reading(
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world=world,
        shuffle=shuffle,
        limit_gb=limit_gb,
    )
    train_order, val_order = orders_of(train_set, val_set, reading)
    train_loader = loader_of(train_set, train_order, transform, prefetch and place is None)
    return train_loader, loader_of(val_set, val_order, val_transform, prefetch)


def _own_arguments() -> list[str]:
    parameters = inspect.signature(create_dataloaders).parameters
    return [name for name in parameters if name != "torch_words"]


def _check_size(found: ShardSet, target_size: Any) -> None:
    have = found.settings.size
    if target_size is not None and not set(np.ravel(target_size).tolist()) <= {have}:
        what = f"{found.address} is {have}x{have}"
        raise WrongSetting("target_size", target_size, f"{what}: convert it with that size")
