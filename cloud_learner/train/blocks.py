"""Building blocks for a family's network.py: any feature spec in, logits out.

Why: what differs between families is how large a network is and what it answers. That words need
a table of embeddings and numbers a scale is the same for all, and so is what keeps it fast: all
words share one table and all numbers one compression, since on a device the count of graph nodes
is the latency.

Invariants: any spec will do, without words, without numbers, with columns that never change. Scales
are frozen from the rows that a network is built on, so they travel inside the package. A number
that leaves its range moves the answer no further than the edge of that range: a feature that
vanishes, or explodes, is bounded. Names of parameters and buffers are those of checkpoints.

Knows nothing about tasks, losses or training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from edge_runtime.features.spec import Spec

Rows = npt.NDArray[np.float32]

STEPS_MAX = 4.0
"""A number counts as at most so many standard deviations from its mean."""

_CONSTANT = 1e-6  # a spread below it is rounding: the column never changed


class Inputs(nn.Module):
    """Raw feature values (batch, columns) as (batch, `width`): words embedded, numbers scaled.

    A number x becomes asinh(x / scale), straight near zero and a logarithm beyond, standardised.
    `compress_beyond` is that scale, in the numbers' own units; without it each column has its
    own, its spread in `rows` (rows, columns), or its size where it never changed there: what is
    new later then counts by how much it differs. Every word has `word_width` numbers.
    """

    words: Tensor
    numbers: Tensor
    offsets: Tensor
    mean: Tensor
    inverse_std: Tensor

    def __init__(
        self, spec: Spec, rows: Rows, *, word_width: int = 6, compress_beyond: float | None = None
    ) -> None:
        super().__init__()
        words = [i for i, column in enumerate(spec.columns) if column.indices]
        numbers = [i for i, column in enumerate(spec.columns) if not column.indices]
        if any(column.pad is not None for column in spec.columns):
            raise ConfigError(
                "text_columns",
                "the tokens of a text stand in an order, which words side by side do not have",
                "give texts a network of their own: a transformer over the columns of their ids",
            )
        self.width = word_width * len(words) + len(numbers)
        if words:
            self._embed(words, [spec.columns[i].indices for i in words], word_width)
        if numbers:
            self._standardise(numbers, torch.as_tensor(rows), compress_beyond)

    def forward(self, features: Tensor) -> Tensor:
        """All columns, embedded or scaled, side by side."""
        parts = []
        if hasattr(self, "words"):
            words = features.index_select(1, self.words).long() + self.offsets
            parts.append(self.embedding(words).flatten(1))
        if hasattr(self, "numbers"):
            numbers = (self._compressed(features) - self.mean) * self.inverse_std
            parts.append(numbers.clamp(-STEPS_MAX, STEPS_MAX))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _embed(self, words: list[int], sizes: list[int], width: int) -> None:
        """One table for all words, each column's part after the one before."""
        self.register_buffer("words", torch.tensor(words))
        self.register_buffer("offsets", torch.tensor([sum(sizes[:k]) for k in range(len(sizes))]))
        self.embedding = nn.Embedding(sum(sizes), width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def _standardise(self, numbers: list[int], rows: Tensor, scale: float | None) -> None:
        self.register_buffer("numbers", torch.tensor(numbers))
        if scale is None:
            size = rows[:, numbers].abs().amax(0)
            size = torch.where(size > 0, size, 1.0)
            self.register_buffer("scale", _spread(rows[:, numbers], size))
        else:
            self.scale = scale
        compressed = self._compressed(rows)
        spread = _spread(compressed, torch.ones(len(numbers)))
        self.register_buffer("mean", compressed.mean(0))
        self.register_buffer("inverse_std", 1.0 / (spread + _CONSTANT))

    def _compressed(self, features: Tensor) -> Tensor:
        return torch.asinh(features.index_select(1, self.numbers) / self.scale)


class Network(Inputs):
    """`Inputs` and a multilayer perceptron of the `hidden` sizes over it: (batch, `outputs`).

    `dropout` is the share of each hidden layer that a training step leaves out.
    """

    def __init__(
        self,
        spec: Spec,
        rows: Rows,
        *,
        hidden: Sequence[int],
        outputs: int = 1,
        dropout: float = 0.0,
        word_width: int = 6,
        compress_beyond: float | None = None,
    ) -> None:
        super().__init__(spec, rows, word_width=word_width, compress_beyond=compress_beyond)
        self.body = perceptron(self.width, hidden, outputs, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of shape (batch, outputs)."""
        logits: Tensor = self.body(super().forward(features))
        return logits


def perceptron(
    width: int, hidden: Sequence[int], outputs: int, dropout: float = 0.0
) -> nn.Sequential:
    """Hidden layers with ReLU, and a linear one from the last of them to the outputs."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def _spread(columns: Tensor, otherwise: Tensor) -> Tensor:
    """The standard deviation of each column; `otherwise` where it never changed."""
    spread = columns.std(0, correction=min(1, len(columns) - 1))
    return torch.where(spread > _CONSTANT * columns.abs().amax(0), spread, otherwise)
