"""What a training is made of before its first step: data, task, device, network, optimizer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loader.loader import Loader
from shards.dataset import ShardSet
from shards.errors import MissingSet
from shards.files import log
from train import ranks
from train.augment import IMAGENET_SCALING, Scaling
from train.caching import Reading, decided
from train.checkpoint import Run, shuffle_of_run
from train.data import CAMERA, ShardDataset, create_dataloaders
from train.errors import NothingToLearn, WrongNetwork
from train.feeding import FedBatches
from train.learnt import FurtherField, Learnt
from train.model import (
    ask,
    build,
    check_answer,
    layout_for,
    scaling_of,
    synchronized,
    unused_parameters,
)
from train.networks.streams import StreamNetwork
from train.opening import open_for_training
from train.order import RowOrder, steps_per_epoch
from train.settings import Settings
from train.split_rows import evaluation_split
from train.tasks import Classes, Task, make_task

SURFACE_PLANES = 5  # of augment.surface


@dataclass(frozen=True, kw_only=True)
class NetworkSetup:
    """What a network needs to answer: it may have learnt from rows that are not at hand."""

    settings: Settings
    learnt: Learnt
    task: Task
    device: torch.device
    # What a batch has before its target.
    batch_fields: tuple[str, ...] = ("rgb", "depth")
    # Of the stored pixels, where the network sees surfaces and the set has one camera: x and y,
    # [1, S, S] each; else empty.
    rays: tuple[Tensor, ...] = ()
    scaling: Scaling = IMAGENET_SCALING  # how the network wants its colours

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """bfloat16 where the GPU has it in hardware (a T4 only emulates it), else float16.

        None on a CPU, which computes in float32.
        """
        if self.device.type != "cuda":
            return None
        has_bfloat16 = torch.cuda.get_device_capability(self.device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16

    @property
    def learns_depth(self) -> bool:
        """Then the network sees RGB alone, and depth is the target."""
        return self.settings.task == "depth"

    @property
    def is_built_in(self) -> bool:
        """Whether the network is this package's, not the user's own."""
        return self.settings.has_trunks

    @property
    def sees_depth(self) -> bool:
        """Whether depth is one of its inputs."""
        return "depth" in self.settings.input_fields

    @property
    def sees_surfaces(self) -> bool:
        """Whether depth comes as surfaces. A user's own network gets it as one plane."""
        return self.is_built_in and self.sees_depth and self.learnt.has_surfaces

    @property
    def network_fields(self) -> tuple[str, ...]:
        """What the network is called with; a user's own with rgb and depth in any case."""
        if self.is_built_in:
            return self.settings.input_fields
        known = ("rgb",) if self.learns_depth else ("rgb", "depth")
        return (*known, *self.settings.further_fields)

    @property
    def planes_of_fields(self) -> dict[str, int]:
        """Of each of `network_fields`."""
        depth = SURFACE_PLANES if self.sees_surfaces else 1
        further = {each.name: each.n_planes for each in self.learnt.further}
        of_all = {"rgb": 3, "depth": depth, **further}
        return {name: of_all[name] for name in self.network_fields}

    @property
    def further_colours(self) -> list[FurtherField]:
        """Of the fields beyond rgb and depth, those of colours and grey levels."""
        return [each for each in self.learnt.further if each.kind != "depth"]

    @property
    def further_depths(self) -> list[FurtherField]:
        """Of the fields beyond rgb and depth, those of depths."""
        return [each for each in self.learnt.further if each.kind == "depth"]


@dataclass(frozen=True, kw_only=True)
class TaskSetup(NetworkSetup):
    """What is learnt, from which rows and where: the same from a run's first step to its last."""

    train_set: ShardDataset
    eval_split: str  # the rows that are scored after each epoch: val or test
    reading: Reading  # in which order, and through how much of a cache

    @property
    def n_steps(self) -> int:
        """Steps an epoch."""
        return steps_per_epoch(len(self.train_set), self.settings.batch_size, ranks.WORLD)


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """Of the train rows, and of those that are scored. split: which these are, val or test."""

    train: Loader
    eval: Loader
    split: str

    @property
    def eval_set(self) -> ShardDataset:
        """The rows that are scored."""
        dataset = self.eval.dataset
        assert isinstance(dataset, ShardDataset)
        return dataset

    def train_places(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        """Where the rows of each train batch, from `start` on, stand in the batch of all ranks."""
        places = order_of(self.train).places(epoch)
        return (places[step] for step in range(start, len(places)))

    def eval_positions(self) -> np.ndarray:
        """Where the rows that this rank scores stand in the split, in the order of the loader."""
        return np.concatenate([np.empty(0, np.int64), *order_of(self.eval)(0)])


def order_of(loader: Loader) -> RowOrder:
    """The order of a loader of this package's."""
    order = loader.batches
    if isinstance(order, FedBatches):
        return order.order
    assert isinstance(order, RowOrder)
    return order


def seed_of(*parts: int) -> int:
    """One 63-bit seed for (seed, epoch, step)."""
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def make_setup(
    settings: Settings, device: torch.device, found: ShardSet | None = None
) -> TaskSetup:
    """Everything but the network and the loaders: a mistake shows before they do anything.

    found: the set, where it is open already. Raises UserError for one that cannot be trained from.
    """
    if found is None:
        found = open_set_of(settings)
    # Checkpoints hold the number; None where the dataset has no scene types.
    n_classes = len(found.dataset.protocol(settings.num_classes).names) or None
    settings = replace(settings, num_classes=n_classes)

    fields = _batch_fields(settings, found)
    for name in (*settings.input_fields, *fields):
        if name != CAMERA.name:  # which may be a column
            found.field(name)
    train_set = ShardDataset(found, fields=fields, target=settings.task, num_classes=n_classes)
    eval_split = evaluation_split(found, settings.eval_split)
    # One without rows to score shows before anything is removed.
    reading = _reading(settings, train_set, rows_of_split(train_set, eval_split))
    settings = replace(settings, shuffle=reading.shuffle)  # checkpoints hold what was decided
    learnt = Learnt.of(train_set, settings.further_fields)
    network = network_setup(settings, learnt, device)
    task = _adjusted(network.task, settings, train_set, device)
    network = replace(network, task=task, batch_fields=fields)
    setup = TaskSetup(
        **vars(network),
        train_set=train_set,
        eval_split=eval_split,
        reading=reading,
    )
    if setup.n_steps == 0:
        what = f"{train_set.path} has {len(train_set)} train rows for {ranks.WORLD} ranks"
        raise NothingToLearn(what, "Use fewer ranks", path=train_set.path)
    return setup


def _adjusted(
    task: Task, settings: Settings, train_set: ShardDataset, device: torch.device
) -> Task:
    """For the classes as frequent as they are among the train rows, where settings say so."""
    if not settings.logit_adjustment:
        return task
    assert isinstance(task, Classes)
    n_rows_k = np.bincount(train_set.labels(), minlength=task.n_out)
    return task.adjusted(settings.logit_adjustment, torch.from_numpy(n_rows_k).to(device))


def open_set_of(settings: Settings) -> ShardSet:
    """What a run learns from. Raises as `open_for_training`."""
    return open_for_training(
        settings.data, allow_remote=settings.allow_remote, cache_dir=settings.cache_dir
    )


def _reading(settings: Settings, train_set: ShardDataset, scored: ShardDataset) -> Reading:
    """How this rank reads: as the first one has worked it out for all.

    The order is that of the run that is there, else the room decides. Raises CacheTooSmall,
    CacheHasNoRoom, OtherRun.
    """

    def of_first() -> Reading:
        reading = Reading(
            batch_size=settings.batch_size,
            seed=settings.seed,
            world=ranks.WORLD,
            shuffle=shuffle_of_run(settings) or settings.shuffle,
            limit_gb=settings.cache_limit_gb,
        )
        return decided(train_set, scored, reading)

    reading: Reading = ranks.broadcast_from_first(of_first)
    return replace(reading, rank=ranks.RANK)


def network_setup(settings: Settings, learnt: Learnt, device: torch.device) -> NetworkSetup:
    """All that its network is built from and asked with."""
    task = make_task(settings, learnt)
    setup = NetworkSetup(
        settings=settings,
        learnt=learnt,
        task=task,
        device=device,
        scaling=scaling_of(settings.model),
    )
    return replace(setup, rays=learnt.rays(device)) if setup.sees_surfaces else setup


def _batch_fields(settings: Settings, found: ShardSet) -> tuple[str, ...]:
    """What is read of each row besides the target."""
    depth = _depth_field(settings, found)
    sees_depth = depth in settings.input_fields
    # Depth that the network does not see is read all the same, where there is some, to be shown.
    is_read = sees_depth or depth in found.manifest.fields or settings.task == "depth"
    has_own_cameras = CAMERA.name in found.manifest.columns and found.dataset.camera is None
    return (
        "rgb",
        *((depth,) if is_read else ()),
        *settings.further_fields,
        *((CAMERA.name,) if sees_depth and has_own_cameras else ()),
    )


def _depth_field(settings: Settings, found: ShardSet) -> str:
    """The depth to hand over; where depth is learnt, the one that tells what was measured."""
    if settings.task != "depth":
        return "depth"
    if "raw_depth" in found.manifest.fields:
        return "raw_depth"
    log(f"{found.path} has no raw_depth: depth is learnt and scored wherever it is not 0")
    return "depth"


def reported_split(setup: TaskSetup) -> str:
    """What a finished run is reported on: test where the set has such rows, else as scored."""
    try:
        rows_of_split(setup.train_set, "test")
    except MissingSet:
        return setup.eval_split
    return "test"


def rows_of_split(train_set: ShardDataset, split: str) -> ShardDataset:
    """The rows of another split, to the same task. Raises MissingSet where it has none for it."""
    return ShardDataset(
        train_set.shard_set,
        split=split,
        fields=train_set.fields,
        target=train_set.target,
        num_classes=train_set.num_classes,
    )


def open_loaders(setup: TaskSetup, split: str) -> Loaders:
    """The loaders of the train rows and of `split`, which is scored, as they are stored.

    They are normalised on the device.
    """
    settings = setup.settings
    train_loader, eval_loader = create_dataloaders(
        setup.train_set.shard_set,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        num_classes=settings.num_classes,
        eval_split=split,
        seed=settings.seed,
        fields=setup.train_set.fields,
        target=settings.task,
        rank=ranks.RANK,
        world=ranks.WORLD,
        normalize=False,
        shuffle=setup.reading.shuffle,
        cache_limit_gb=setup.reading.limit_gb,
    )
    return Loaders(train=train_loader, eval=eval_loader, split=split)


# ---------------------------------------------------------------- the network and its optimizer


def new_run(setup: NetworkSetup) -> Run:
    """Fresh weights, optimizer and counts. Raises WrongNetwork for one that is no answer."""
    torch.manual_seed(seed_of(setup.settings.seed))
    model, layout = _new_model(setup)
    if not setup.is_built_in:
        probe(model, setup)

    optimizer = _new_optimizer(model, setup.settings)
    is_scaled = setup.autocast_dtype == torch.float16
    scaler = torch.amp.GradScaler(setup.device.type, enabled=is_scaled)
    sums = torch.zeros(2 + setup.task.n_counts, dtype=torch.float64, device=setup.device)
    return Run(
        model=model,
        net=model,
        layout=layout,
        optimizer=optimizer,
        scaler=scaler,
        sums=sums,
        counts=sums[2:],
        history=[],
    )


def _new_model(setup: NetworkSetup) -> tuple[nn.Module, torch.memory_format]:
    """On the setup's device, and the layout that it is in."""
    settings = setup.settings
    model = build(
        settings.model,
        setup.task.n_out,
        width=settings.channels,
        planes=setup.planes_of_fields,
        dense=settings.task != "scene",
        size=settings.size or setup.learnt.size,
    )
    if settings.freeze_maps:
        assert isinstance(model, StreamNetwork)
        for trunk in model.trunks():
            trunk.keep_layers_of(settings.freeze_maps)
    # A network of a user's own may flatten its features, which channels_last forbids.
    layout = layout_for(model, setup.device) if setup.is_built_in else torch.contiguous_format
    model = model.to(setup.device, memory_format=layout)  # type: ignore[call-overload]

    if setup.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        if ranks.WORLD > 1:
            model = synchronized(settings.model, model)
    return model, layout


def _new_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; biases and norms are not decayed. Each group has a `share` of the learning rate."""
    if settings.trunk_lr == 1:
        groups = _groups(model.parameters(), settings, share=1.0)
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)

    assert isinstance(model, StreamNetwork)
    of_trunks = [parameter for trunk in model.trunks() for parameter in trunk.parameters()]
    numbers = set(map(id, of_trunks))
    of_head = [parameter for parameter in model.parameters() if id(parameter) not in numbers]
    groups = [
        *_groups(of_head, settings, share=1.0),
        *_groups(of_trunks, settings, share=settings.trunk_lr),
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def _groups(
    parameters: Iterable[nn.Parameter], settings: Settings, *, share: float
) -> list[dict[str, Any]]:
    """What is decayed, and what is not."""
    given = list(parameters)
    matrices = [parameter for parameter in given if parameter.ndim > 1]
    vectors = [parameter for parameter in given if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": settings.weight_decay, "share": share},
        {"params": vectors, "weight_decay": 0.0, "share": share},
    ]


def to_learn(model: nn.Module, settings: Settings, epoch: int) -> None:
    """The network in training mode, its norms as the settings want them in this epoch."""
    model.train()
    if settings.freezes_norms(epoch):
        assert isinstance(model, StreamNetwork)
        for trunk in model.trunks():
            trunk.freeze_norms()


def probe(model: nn.Module, setup: NetworkSetup) -> None:
    """Refuse a network of a user's own that does not answer as the task needs.

    It is asked about two grey pictures, in evaluation mode, and torch's random numbers are put
    back: what it learns afterwards does not change. Raises WrongNetwork.
    """
    spec = setup.settings.model
    size = setup.settings.size or setup.learnt.size
    planes = setup.planes_of_fields.values()
    pictures = [torch.full((2, n, size, size), 0.5, device=setup.device) for n in planes]

    devices = [setup.device] if setup.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        out = ask(spec, model, pictures)
        model.train()
    check_answer(spec, out, setup.task.n_out, setup.settings.task)

    # DistributedDataParallel waits for the gradient of every parameter that can learn.
    unused = unused_parameters(model, out) if ranks.WORLD > 1 else []
    if unused:
        names = ", ".join(unused[:3])
        what = f"does not use {names}: with several ranks it must, or freeze it"
        raise WrongNetwork(spec, what)
