"""Headwater on a device: predictions in microseconds, a durable event log, signed updates.

General layout, from the bottom up: errors, clock, files, metrics, config; wire, bus, features,
personal, inference, events, update, rollout; device, runtime; api; daemon; cli. A room imports only
from rooms below.

ONNX Runtime's wheels report usage by default; the switch below must be set before it is imported.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from edge_runtime.errors import HeadwaterError as HeadwaterError
    from edge_runtime.runtime import Prediction as Prediction
    from edge_runtime.runtime import Runtime as Runtime
    from edge_runtime.session import Session as Session

_HOMES = {
    "Runtime": "edge_runtime.runtime",
    "Prediction": "edge_runtime.runtime",
    "Session": "edge_runtime.session",
    "HeadwaterError": "edge_runtime.errors",
}
__all__ = ["HeadwaterError", "Prediction", "Runtime", "Session"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
