"""The networks of this family: a teacher for the cloud and a student of device size.

Both take raw feature values, float32 of shape (batch, features), in the order of the feature spec,
and return logits of shape (batch, 1). Scaling is part of the network, with statistics frozen from
the rows that it was built on, so it travels inside the package. All words share one table of
embeddings, and all numbers one compression: on a device the count of graph nodes is the latency.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_runtime.features.spec import Spec

COMPRESS_BEYOND = 20.0  # minutes of delay, departures, miles
WORD_WIDTH = 6

Rows = npt.NDArray[np.float32]


def build_teacher(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the cloud."""
    return Network(spec, rows, hidden=(96, 64), dropout=0.1)


def build_student(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the device."""
    return Network(spec, rows, hidden=(64, 32), dropout=0.0)


class Network(nn.Module):
    """Embedded words, standardised numbers, and a multilayer perceptron over both."""

    def __init__(self, spec: Spec, rows: Rows, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        words = [i for i, column in enumerate(spec.columns) if column.indices]
        numbers = [i for i in range(spec.size) if i not in words]
        sizes = [spec.columns[i].indices for i in words]
        self.register_buffer("words", torch.tensor(words))
        self.register_buffer("numbers", torch.tensor(numbers))
        self.register_buffer("offsets", torch.tensor([sum(sizes[:k]) for k in range(len(sizes))]))
        self.embedding = nn.Embedding(sum(sizes), WORD_WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        compressed = self._compressed(torch.tensor(rows))
        self.register_buffer("mean", compressed.mean(0))
        self.register_buffer("inverse_std", 1.0 / (compressed.std(0) + 1e-6))
        self.body = _perceptron(WORD_WIDTH * len(words) + len(numbers), hidden, dropout)

    def forward(self, features: Tensor) -> Tensor:
        words = features.index_select(1, self.words).long() + self.offsets
        numbers = (self._compressed(features) - self.mean) * self.inverse_std
        columns = [self.embedding(words).flatten(1), numbers.clamp(-4.0, 4.0)]
        return self.body(torch.cat(columns, dim=1))

    def _compressed(self, features: Tensor) -> Tensor:
        """The numeric columns as asinh(x / 20): straight near zero, a logarithm beyond."""
        return torch.asinh(features.index_select(1, self.numbers) / COMPRESS_BEYOND)


def _perceptron(width: int, hidden: tuple[int, ...], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = size
    return nn.Sequential(*layers, nn.Linear(width, 1))
