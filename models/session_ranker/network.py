"""The networks of this family: wide and deep, as what people differ in has to reach the last layer.

Why: a network that is asked what everybody likes keeps nothing of what some like and others do not:
in its hidden layers a taste that has no mean has no place. So the facts go around them as well
(Cheng et al. 2016), and a session's head, which stands on what goes into the last layer, finds
genres and factors there as they are.

Knows one word, the hour; all other columns are numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cloud_learner.train.blocks import Inputs, Rows, perceptron
from edge_runtime.features.spec import Spec

LINEAR_WITHIN = 20.0  # deviations; factors are not compressed


class Ranker(Inputs):
    """Logits (batch, 1) from what is known of an item, what the hour makes of it, and the last of
    the `hidden` layers, side by side.

    An hour is a number for each number of an item (Rendle 2010, factorization machines).
    """

    def __init__(
        self, spec: Spec, rows: Rows, hidden: tuple[int, ...], dropout: float = 0.0
    ) -> None:
        facts = sum(not column.indices for column in spec.columns)
        super().__init__(spec, rows, word_width=facts, compress_beyond=LINEAR_WITHIN)
        self.body = perceptron(self.width, hidden[:-1], hidden[-1], dropout)
        self.last = nn.Linear(facts + 1 + hidden[-1], 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of shape (batch, 1)."""
        inputs = super().forward(features)
        hour, facts = inputs.chunk(2, dim=1)
        liked, deep = (hour * facts).sum(1, keepdim=True), torch.relu(self.body(inputs))
        logits: Tensor = self.last(torch.cat([facts, liked, deep], dim=1))
        return logits


def build_teacher(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the cloud."""
    return Ranker(spec, rows, hidden=(96, 64), dropout=0.1)


def build_student(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the device; its embedding has 31 numbers."""
    return Ranker(spec, rows, hidden=(32, 8))
