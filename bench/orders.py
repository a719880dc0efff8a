"""What an order that needs only some shards at a time costs in accuracy.

    python -m bench.orders [--rows 65536] [--seeds 3]

Made-up rows of 64 classes, a class 8 blobs of 32 features, in shards of 128. A network of two
layers, with BatchNorm and without, learns from batches of 256 for 3 epochs with a rate that stays,
and is scored on other rows. Rows lie sorted by class, the worst case, or dealt to shards at random
once, as tables are converted. Each figure is the mean of the seeds and their standard deviation.

chi2 is of the numbers of rows of each class in a batch, and in 16 batches one after the other, by
its degrees of freedom: 1 is what independent draws give, 0 the same number of every class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.command import add_number, exit_status, make_parser
from convert.sources.dealing import dealt_order
from shards.flags import Parser, whole
from shards.spec import SPLITS
from train.order import Batches
from train.wheel import WheelBatches

N_CLASSES = 64
N_BLOBS = 8  # of a class
N_FEATURES = 32
NOISE = 0.75  # of a row about its blob, where blobs have a deviation of 1 about the origin
N_SCORED = 16_384
N_HIDDEN = 256
ROWS_PER_SHARD = 128
BATCH_ROWS = 256
N_EPOCHS = 3
RATE = 0.1
MOMENTUM = 0.9
IN_PLAY = (8, 32, 64)
N_TOGETHER = 16  # batches of the second chi2

Epochs = Callable[[int], Sequence[np.ndarray]]


# ------------------------------------------------------------------------------------------ orders


@dataclass(frozen=True)
class WindowBatches:
    """Shards in random order; as many as are in play come together and are shuffled together, then
    the next ones.
    """

    n_rows: int
    in_play: int
    seed: int

    def __call__(self, epoch: int) -> list[np.ndarray]:
        """The positions of each batch."""
        rng = np.random.default_rng([self.seed, epoch])
        shards = np.arange(self.n_rows).reshape(-1, ROWS_PER_SHARD)
        ring = rng.permutation(len(shards))
        windows = [
            rng.permutation(shards[ring[at : at + self.in_play]].ravel())
            for at in range(0, len(ring), self.in_play)
        ]
        rows = np.concatenate(windows)
        n_steps = len(rows) // BATCH_ROWS
        return [np.sort(rows[k * BATCH_ROWS : (k + 1) * BATCH_ROWS]) for k in range(n_steps)]


def orders(n_rows: int, seed: int) -> dict[str, Epochs]:
    """What is compared, by name. n_rows: of whole shards."""
    shard_rows = np.full(n_rows // ROWS_PER_SHARD, ROWS_PER_SHARD)
    found: dict[str, Epochs] = {"full": Batches(n_rows, BATCH_ROWS, seed)}
    # Of a wheel of one shard each slot is a shard, shuffled.
    found["one shard after the other"] = WheelBatches(shard_rows, 1, BATCH_ROWS, seed)
    for in_play in IN_PLAY:
        found[f"window of {in_play}"] = WindowBatches(n_rows, in_play, seed)
    for in_play in IN_PLAY:
        found[f"wheel of {in_play}"] = WheelBatches(shard_rows, in_play, BATCH_ROWS, seed)
    return found


def chi2_by_freedom(batches: Sequence[np.ndarray], classes: np.ndarray, n_together: int) -> float:
    """Mean over groups of so many batches one after the other. classes: [N] of the positions."""
    found = []
    for at in range(0, len(batches) - n_together + 1, n_together):
        rows = np.concatenate(batches[at : at + n_together])
        counts = np.bincount(classes[rows], minlength=N_CLASSES)
        expected = len(rows) / N_CLASSES
        found.append(((counts - expected) ** 2 / expected).sum() / (N_CLASSES - 1))
    return float(np.mean(found))


# ---------------------------------------------------------------------------------------- learning


@dataclass(frozen=True, kw_only=True)
class Rows:
    """features: [N, 32] float32. classes: [N] int64."""

    features: Tensor
    classes: Tensor


def made_up_rows(n_rows: int) -> tuple[Rows, Rows]:
    """(sorted by class, to be scored on), the same every time."""
    rng = np.random.default_rng(0)
    blobs = rng.standard_normal((N_CLASSES, N_BLOBS, N_FEATURES), np.float32)

    def drawn(classes: np.ndarray) -> Rows:
        centres = blobs[classes, rng.integers(N_BLOBS, size=len(classes))]
        noise = rng.standard_normal(centres.shape, np.float32)
        features = torch.from_numpy(centres + np.float32(NOISE) * noise)
        return Rows(features=features, classes=torch.from_numpy(classes))

    train = drawn(np.arange(n_rows) * N_CLASSES // n_rows)
    return train, drawn(rng.integers(N_CLASSES, size=N_SCORED))


def dealt(rows: Rows) -> Rows:
    """As a table with these lines is converted."""
    split = np.full(len(rows.classes), SPLITS.index("train"), np.uint8)
    lines = torch.from_numpy(dealt_order(split).astype(np.int64))
    return Rows(features=rows.features[lines], classes=rows.classes[lines])


def network(seed: int, is_normed: bool) -> nn.Sequential:
    """[B, 32] -> [B, 64], with fresh weights."""
    torch.manual_seed(seed)
    norm = [nn.BatchNorm1d(N_HIDDEN)] if is_normed else []
    hidden = nn.Linear(N_FEATURES, N_HIDDEN)
    return nn.Sequential(hidden, *norm, nn.ReLU(), nn.Linear(N_HIDDEN, N_CLASSES))


def accuracy_after(order: Epochs, rows: Rows, scored: Rows, model: nn.Module) -> float:
    """Percent of the scored rows, after all epochs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    model.train()
    for epoch in range(N_EPOCHS):
        for batch in order(epoch):
            index = torch.from_numpy(batch)
            loss = nn.functional.cross_entropy(model(rows.features[index]), rows.classes[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model.eval()
    with torch.inference_mode():
        answers = model(scored.features).argmax(1)
    return 100 * float((answers == scored.classes).double().mean())


def mean_and_spread(values: Sequence[float], n_digits: int = 1) -> str:
    """Mean and standard deviation, for a cell of a table."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{n_digits}f} ± {spread:.{n_digits}f}"


def cells(name: str, rows: Rows, scored: Rows, n_seeds: int) -> Iterator[str]:
    """Of one order: both chi2, then the accuracy with BatchNorm and without."""
    n_rows = len(rows.classes)
    batches = list(orders(n_rows, 0)[name](0))
    for n_together in (1, N_TOGETHER):
        yield f"{chi2_by_freedom(batches, rows.classes.numpy(), n_together):.2f}"
    for is_normed in (True, False):
        found = [
            accuracy_after(orders(n_rows, seed)[name], rows, scored, network(seed, is_normed))
            for seed in range(n_seeds)
        ]
        yield mean_and_spread(found)


def report(n_rows: int, n_seeds: int) -> None:
    """A table of rows sorted by class, and one of the same rows dealt."""
    torch.set_num_threads(1)
    train, scored = made_up_rows(n_rows - n_rows % BATCH_ROWS)
    for title, rows in (("rows sorted by class", train), ("the same rows dealt", dealt(train))):
        print(f"\n{title}\n")
        print("| order | chi2 of a batch | of 16 batches | accuracy, BatchNorm | without |")
        print("|---|---|---|---|---|")
        for name in orders(len(rows.classes), 0):
            line = " | ".join(cells(name, rows, scored, n_seeds))
            print(f"| {name} | {line} |", flush=True)


def make_flags() -> Parser:
    """Those of the command line."""
    parser = make_parser("orders", __doc__)
    parser.add_argument(
        "--rows",
        type=whole(BATCH_ROWS, 10_000_000),
        default=65_536,
        metavar="N",
        help=f"to learn from ({BATCH_ROWS} to 10000000, default: %(default)s)",
    )
    add_number(parser, "--seeds", 3, "trainings of each kind")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    return exit_status(lambda: report(args.rows, args.seeds))


if __name__ == "__main__":
    sys.exit(main())
