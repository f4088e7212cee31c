"""The networks of this family: embedded words, compressed numbers, a perceptron over both."""

from __future__ import annotations

from torch import nn

from cloud_learner.train.blocks import Network, Rows
from edge_runtime.features.spec import Spec


def build_teacher(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the cloud."""
    return Network(spec, rows, hidden=(96, 64), dropout=0.2)


def build_student(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the device."""
    return Network(spec, rows, hidden=(64, 32))
