"""What the network says of each scored row, kept small: a few numbers a row, pictures of the worst.

Collector           filled while the rows of a split are scored; each rank has its own rows
  Answers           of all of them: table (predictions.csv), worst (mistakes.png)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train import ranks
from train.data import ShardDataset
from train.job import NetworkSetup, TaskSetup
from train.tasks import Depth

MOST_PICTURES = 24  # on a page
IDS = ("true", "named")  # columns that hold the number of a class
Batch = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said of one picture.

    columns: what stands in predictions.csv, classes as their numbers. loss: 0 where the class is
    right or nothing is known. predicted: a class id, class ids [H, W], or metres [H, W].
    """

    columns: dict[str, float]
    loss: float
    predicted: Tensor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One picture and what the network says of it.

    table_row: its line in predictions.csv. loss: 0 where the class is right or nothing is known.
    true, predicted: a class id, class ids [H, W], or metres [H, W]; true is None where not known.
    """

    table_row: dict[str, Any]
    loss: float
    rgb_hwc: np.ndarray
    depth_m_hw: np.ndarray
    true: np.ndarray | None
    predicted: np.ndarray


# ---------------------------------------------------------------- one picture


def answer_of(setup: NetworkSetup, out: Tensor, true: Tensor | None) -> Answer:
    """Of the outputs [K] or [K, H, W] for one picture; `true` is None where nothing is known."""
    judgement: dict[str, float] = {}
    loss = 0.0
    if true is not None:
        judgement, loss = _judgement(setup, out[None], true[None])
    predicted, said = _said(setup, out)
    return Answer(columns={**judgement, **said}, loss=loss, predicted=predicted)


def _said(setup: NetworkSetup, out: Tensor) -> tuple[Tensor, dict[str, float]]:
    """What the network says of one picture: to be drawn, and for the table.

    The column of the predicted class is called "named": programs of users read it.
    """
    if isinstance(setup.task, Depth):
        metres = setup.task.metres(out)
        return metres, {"median_m": round(float(np.median(as_array(metres))), 3)}

    confidence, ids = out.softmax(0).max(0)
    most_frequent = int(torch.bincount(ids.flatten()).argmax())
    return ids, {"named": most_frequent, "confidence": round(float(confidence.mean()), 4)}


def _judgement(setup: NetworkSetup, out: Tensor, target: Tensor) -> tuple[dict[str, float], float]:
    """The true class, or the scores, of this one picture; and its loss."""
    loss_sum, weight = setup.task.loss(out, target)
    loss = float(loss_sum / weight) if weight > 0 else 0.0
    if target.ndim > 1:
        scores = setup.task.scores(setup.task.count(out, target))
        return {name: round(value, 4) for name, value in scores.items()}, loss

    is_right = bool(out.argmax() == target)
    return {"true": int(target)}, 0.0 if is_right else loss


def as_array(tensor: Tensor) -> np.ndarray:
    """On the CPU, without axes of length 1; class ids as int16."""
    array: np.ndarray = tensor.squeeze().cpu().numpy()
    return array.astype(np.int16) if array.dtype == np.int64 else array


def table_row(setup: NetworkSetup, picture: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """A line of predictions.csv: classes by their names."""
    row: dict[str, Any] = {"picture": picture}
    for name, value in columns.items():
        row[name] = setup.task.names[int(value)] if name in IDS else float(value)
    return row


def prediction_of(
    setup: NetworkSetup,
    name: str,
    answer: Answer,
    pictures: tuple[Tensor, Tensor],
    true: Tensor | None,
) -> Prediction:
    """Of the picture `name`, whose rgb is [3, H, W] and depth in millimetres [1, H, W]."""
    rgb_chw, depth_mm_1hw = pictures
    return Prediction(
        table_row=table_row(setup, name, answer.columns),
        loss=answer.loss,
        rgb_hwc=rgb_chw.permute(1, 2, 0).cpu().numpy().copy(),
        depth_m_hw=depth_mm_1hw[0].cpu().numpy() / 1000,
        true=None if true is None else as_array(true).copy(),
        predicted=as_array(answer.predicted),
    )


# ---------------------------------------------------------------- the rows of a split


class RowNames:
    """`row 7: kitchen_0003` of each row of a split, by its position."""

    def __init__(self, dataset: ShardDataset) -> None:
        self._rows = dataset.rows
        self._scene_of_row = dataset.row_facts("scene")
        self._scenes = dataset.shard_set.manifest.scenes

    def __getitem__(self, position: int) -> str:
        return f"row {self._rows[position]}: {self._scenes[self._scene_of_row[position]]}"


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A prediction and where its row stands in the split: equal losses keep the rows' order."""

    position: int
    prediction: Prediction

    @property
    def key(self) -> tuple[float, int]:
        """The worst come first."""
        return -self.prediction.loss, self.position


def worst_of(ranked: Sequence[Ranked]) -> list[Ranked]:
    """At most as many as a page shows."""
    return sorted(ranked, key=lambda each: each.key)[:MOST_PICTURES]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the network says of the rows of a split, in their order.

    columns: [N] each, of predictions.csv; classes as their numbers. worst: those with the greatest
    loss, with their pictures; none that is right, or of which nothing is known.
    """

    setup: TaskSetup
    dataset: ShardDataset
    columns: dict[str, np.ndarray]
    worst: list[Prediction]

    @property
    def table(self) -> "Table":
        """The lines of predictions.csv."""
        return Table(self)


class Table(Sequence[dict[str, Any]]):
    """Lines that are made when they are asked for: a million of them would be half a GB."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._names = RowNames(answers.dataset)

    def __len__(self) -> int:
        return len(self._answers.dataset)

    def __getitem__(self, position: Any) -> Any:
        row = range(len(self))[position]  # IndexError ends an iteration
        columns = {name: column[row] for name, column in self._answers.columns.items()}
        return table_row(self._answers.setup, self._names[row], columns)


class Collector:
    """Takes what the network says of a rank's rows, batch after batch.

    positions: [N] of these rows in the split, in the order in which they will come.
    """

    def __init__(self, setup: TaskSetup, dataset: ShardDataset, positions: np.ndarray) -> None:
        self.dataset = dataset
        self.setup = setup
        self._positions = positions
        self._names = RowNames(dataset)
        self._n_added = 0
        self._columns: dict[str, np.ndarray] = {}  # [N] each
        self._worst: list[Ranked] = []

    def add(self, out: Tensor, batch: Batch) -> None:
        """The outputs for the next rows; batch: their (rgb, depth, target)."""
        rgb, depth, target = batch
        for k in range(len(rgb)):
            answer = answer_of(self.setup, out[k], target[k])
            self._keep(answer)
            if self._is_among_the_worst(answer):
                self._show(answer, (rgb[k], depth[k]), target[k])
            self._n_added += 1

    def _keep(self, answer: Answer) -> None:
        for name, value in answer.columns.items():
            if name not in self._columns:
                dtype = np.int32 if name in IDS else np.float64
                self._columns[name] = np.zeros(len(self._positions), dtype)
            self._columns[name][self._n_added] = value

    def _is_among_the_worst(self, answer: Answer) -> bool:
        is_full = len(self._worst) == MOST_PICTURES
        least = self._worst[-1].prediction.loss if is_full else 0.0
        return answer.loss > least

    def _show(self, answer: Answer, pictures: tuple[Tensor, Tensor], true: Tensor) -> None:
        position = int(self._positions[self._n_added])
        prediction = prediction_of(self.setup, self._names[position], answer, pictures, true)
        self._worst = worst_of([*self._worst, Ranked(position=position, prediction=prediction)])

    def answers(self) -> Answers:
        """Of the rows of all ranks; every rank calls it."""
        parts = ranks.gather((self._positions, self._columns, self._worst))
        order = np.argsort(np.concatenate([positions for positions, _, _ in parts]))
        with_rows = [columns for _, columns, _ in parts if columns]  # a rank may have none
        columns = {
            name: np.concatenate([each[name] for each in with_rows])[order]
            for name in (with_rows[0] if with_rows else ())
        }
        worst = worst_of([ranked for _, _, of_rank in parts for ranked in of_rank])
        predictions = [each.prediction for each in worst]
        return Answers(setup=self.setup, dataset=self.dataset, columns=columns, worst=predictions)
