"""How a device stands: each sign of trouble is named, and none is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.device.standing import health

MB = 1 << 20


def config(nats="nats://127.0.0.1:4222"):
    root = Path("root.json")
    return EdgeConfig(
        device="kiosk-1",
        families=["toy"],
        state_dir=Path("state"),
        socket=Path("edge.sock"),
        nats=nats,
        root=root,
        log=LogConfig(bytes_max_mb=100),
    )


def status(*, failing=0, bytes_=0, parts=None, **uplink):
    return {"log": {"failing": failing, "bytes": bytes_}, "uplink": uplink} | (parts or {})


@pytest.mark.parametrize(
    ("found", "reasons"),
    [
        (status(), []),
        (status(failing=1), ["log_failing"]),
        (status(bytes_=91 * MB), ["log_full"]),
        (status(bytes_=89 * MB), []),
        (status(held=1), ["stream_full"]),
        (status(parts={"agent": {"metadata_stale": 1}}), ["metadata_stale"]),
        (status(parts={"starts": {"releases_left": 1}}), ["crash_loop"]),
        (status(parts={"watch": {"releases_left": 1}}), ["bad_answers"]),
        (status(duplicate_identity=2, held=1), ["stream_full", "duplicate_identity"]),
    ],
)
def test_a_device_names_what_it_works_worse_by(found, reasons):
    assert health(config(), found) == {"degraded": int(bool(reasons)), "reasons": reasons}


def test_a_log_that_nobody_reads_may_be_full():
    assert health(config(nats=""), status(bytes_=99 * MB))["reasons"] == []


def test_a_device_without_a_broker_has_no_uplink():
    assert health(config(), {"log": {"failing": 0, "bytes": 0}})["degraded"] == 0
