"""Which rows go through a network together: the parts of a pass, and of a look at many rows.

Why: a step of few rows is as large as one of many, groups that compete must stay whole, and texts
cost what the longest of a part costs: most of a batch of mixed lengths is padding.

A network that has a method `lengths`, features (rows, columns) to (rows,), says how long its rows
are; its parts hold rows of like length. All others see many rows at once.

Invariants: each row is in one part; same rows and random numbers, same parts. What a network
answers for a row does not depend on the part, beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cloud_learner.train.dataset import Matrix, Rows

LOOKED_AT = 64
"""Rows of a network that has lengths, at once."""
_ALIKE = 32  # parts that are sorted by length together

Index = npt.NDArray[np.intp]


def lengths_of(network: nn.Module, features: Matrix) -> Index | None:
    """How long each row is, (rows,); None where the network does not say."""
    if not hasattr(type(network), "lengths") or not len(features):  # a layer may be called so
        return None
    lengths: Tensor = network.lengths(torch.from_numpy(features))  # type: ignore[operator]
    found: Index = lengths.numpy().astype(np.intp)
    return found


def looked_at(network: nn.Module, features: Matrix, look: Callable[[Tensor], Tensor]) -> Tensor:
    """What `look` makes of the features (rows, columns), a row for each: in parts of like length
    where the network has lengths, at once elsewhere.
    """
    lengths = lengths_of(network, features)
    if lengths is None:
        return look(torch.from_numpy(features))
    order = np.argsort(lengths, kind="stable")
    starts = range(0, len(order), LOOKED_AT)
    parts = [look(torch.from_numpy(features[order[at : at + LOOKED_AT]])) for at in starts]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def chunks(
    count: int, rows_max: int, random: np.random.Generator, lengths: Index | None = None
) -> list[Index]:
    """Positions 0 to count-1 in random order, in even parts of at most `rows_max`.

    Even, because a small remainder would make a step as large as the others, of few rows. With
    `lengths` (count,) the rows of a part are of like length, and the parts in random order.
    """
    order = random.permutation(count)
    if lengths is None:
        return np.array_split(order, -(-count // rows_max)) if count else []
    parts = []
    for start in range(0, count, _ALIKE * rows_max):
        some = order[start : start + _ALIKE * rows_max]
        some = some[np.argsort(lengths[some], kind="stable")]
        parts += np.array_split(some, -(-len(some) // rows_max))
    return [parts[at] for at in random.permutation(len(parts))]


def chunks_of(
    rows: Rows, rows_max: int, random: np.random.Generator, lengths: Index | None = None
) -> list[Index]:
    """`chunks` of the rows; where they compete in groups, no group is torn apart."""
    groups = rows.groups
    if len(groups) and (groups != groups[0]).any():
        return _whole_groups(groups, rows_max, random)
    return chunks(len(rows), rows_max, random, lengths)


def _whole_groups(
    groups: npt.NDArray[np.int64], rows_max: int, random: np.random.Generator
) -> list[Index]:
    _, number = np.unique(groups, return_inverse=True)
    place = random.permutation(number.max() + 1)[number]
    order = np.argsort(place, kind="stable")
    ends = np.flatnonzero(np.diff(place[order])) + 1
    cuts, start = [], 0
    for end in ends.tolist():
        if end - start >= rows_max:
            cuts.append(end)
            start = end
    return [chunk for chunk in np.split(order, cuts) if len(chunk)]
