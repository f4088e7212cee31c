"""The networks of this family: a teacher for the cloud and a student of device size.

Both take raw feature values, float32 of shape (batch, features), in the order of the feature spec,
and return logits of shape (batch, 1).
"""

from __future__ import annotations

from torch import nn

from cloud_learner.train.blocks import Network, Rows
from edge_runtime.features.spec import Spec

COMPRESS_BEYOND = 20.0  # minutes of delay, departures, miles


def build_teacher(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the cloud."""
    return Network(spec, rows, hidden=(96, 64), dropout=0.1, compress_beyond=COMPRESS_BEYOND)


def build_student(spec: Spec, rows: Rows) -> nn.Module:
    """A network for the device."""
    return Network(spec, rows, hidden=(64, 32), compress_beyond=COMPRESS_BEYOND)
