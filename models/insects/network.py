"""The networks of this family: standardised numbers and a perceptron, six classes."""

from __future__ import annotations

from torch import nn

from cloud_learner.train.blocks import Network, Rows
from edge_runtime.features.spec import Spec

CLASSES = 6


def build_teacher(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the cloud."""
    return Network(spec, rows, hidden=(64, 64), outputs=CLASSES, dropout=0.1)


def build_student(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the device."""
    return Network(spec, rows, hidden=(64, 64), outputs=CLASSES)
