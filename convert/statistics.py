"""Mean and standard deviation of a field, from the exact sums that each shard's receipt holds."""

from collections.abc import Iterable, Sequence

import numpy as np

from shards.manifest import ChannelSums
from shards.spec import Field, Statistics


def train_sums(field: Field, rows: Iterable[np.ndarray]) -> tuple[ChannelSums, ...]:
    """(count, sum, sum of squares) a channel over the rows' valid pixels; () of ids.

    Valid: every pixel of colour and grey, every measured one of depth. Exact: float64 holds a row's
    sums as whole numbers.
    """
    if field.kind == "id":
        return ()
    n_channels = field.planes[0] if field.planes else 1
    total = [[0, 0, 0] for _ in range(n_channels)]  # Python's numbers: int64 would overflow
    for row in rows:
        pixels = row.reshape(n_channels, -1).astype(np.float64)
        n_valid = pixels.shape[1] if field.invalid is None else int(np.count_nonzero(row))
        sums = pixels.sum(1).tolist()
        sums_of_squares = np.einsum("cp,cp->c", pixels, pixels).tolist()  # in one pass
        for channel, of_row in enumerate(zip(sums, sums_of_squares, strict=True)):
            total[channel][0] += n_valid
            total[channel][1] += int(of_row[0])
            total[channel][2] += int(of_row[1])
    return tuple((count, first, squares) for count, first, squares in total)


def statistics(shard_sums: Sequence[tuple[ChannelSums, ...]]) -> Statistics | None:
    """Of all shards; None of ids, and where no pixel of a train row is valid."""
    found = [sums for sums in shard_sums if sums]
    total = [
        [sum(values) for values in zip(*channel, strict=True)]
        for channel in zip(*found, strict=True)
    ]
    if not total or not all(count for count, _, _ in total):
        return None
    deviations = []
    for count, first, squares in total:
        variance = (squares - first * first / count) / count
        deviations.append(max(0.0, variance) ** 0.5)
    return Statistics(
        count=tuple(count for count, _, _ in total),
        mean=tuple(first / count for count, first, _ in total),
        std=tuple(deviations),
    )
