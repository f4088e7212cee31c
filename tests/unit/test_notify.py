"""The supervisor is told over a real datagram socket, bound where NOTIFY_SOCKET says."""

from __future__ import annotations

import asyncio
import configparser
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import notify
from edge_runtime.cli import main

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "docs/headwater-edge.service"


@pytest.fixture(params=["path", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """A bound datagram socket; its address as systemd writes it is `address_of(it)`."""
    name = f"\0headwater-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(name)
        channel.settimeout(10)
        yield channel


def address_of(supervisor: socket.socket) -> str:
    name = supervisor.getsockname()
    return f"@{name[1:].decode()}" if isinstance(name, bytes) else name


def told(supervisor: socket.socket, code: str, **environment: str) -> list[str]:
    """What a process that runs `code` tells the supervisor."""
    subprocess.run(
        [sys.executable, "-c", f"import asyncio, os; from edge_runtime import notify\n{code}"],
        cwd=ROOT,
        env={"NOTIFY_SOCKET": address_of(supervisor)} | environment,
        check=True,
        timeout=30,
    )
    supervisor.setblocking(False)
    heard = []
    while True:
        try:
            heard.append(supervisor.recv(4096).decode())
        except BlockingIOError:
            return heard


def test_ready_and_stopping_are_told(supervisor: socket.socket) -> None:
    code = "notify.ready('serves toy'); notify.ready(); notify.stopping()"
    assert told(supervisor, code) == ["READY=1\nSTATUS=serves toy", "READY=1", "STOPPING=1"]


def test_the_watchdog_is_fed_until_cancelled(supervisor: socket.socket) -> None:
    code = "asyncio.run(asyncio.wait_for(notify.watchdog(), 0.1))"
    code = f"try:\n    {code}\nexcept TimeoutError:\n    pass"
    heard = told(supervisor, code, WATCHDOG_USEC="2000")
    assert len(heard) >= 2
    assert set(heard) == {"WATCHDOG=1"}


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": "1"}],
    ids=["none", "garbage", "of another process"],
)
def test_a_watchdog_that_is_not_ours_is_not_fed(
    supervisor: socket.socket, environment: dict[str, str]
) -> None:
    assert told(supervisor, "asyncio.run(notify.watchdog())", **environment) == []


def test_a_watchdog_of_this_very_process_is_fed_at_half_its_time(supervisor: socket.socket) -> None:
    code = "os.environ['WATCHDOG_PID'] = str(os.getpid()); assert notify.watchdog_s() == 30"
    assert told(supervisor, code, WATCHDOG_USEC="30000000") == []


def test_without_a_supervisor_nothing_happens() -> None:
    assert "NOTIFY_SOCKET" not in os.environ
    notify.ready("alone")
    notify.stopping()
    asyncio.run(notify.watchdog())


def test_a_supervisor_that_is_gone_is_named_and_ends_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from edge_runtime import notify; notify.ready()"],
        cwd=ROOT,
        env={"NOTIFY_SOCKET": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert "not told READY=1" in done.stderr


def test_the_unit_starts_a_command_that_there_is_and_waits_for_what_it_tells() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read(UNIT)
    program, command, *options = unit["Service"]["ExecStart"].split()
    assert Path(program).name == "edge-runtime"
    main.commands[command].make_context(command, options)
    assert unit["Service"]["Type"] == "notify"
    assert float(unit["Service"]["WatchdogSec"]) > 0
    assert "Environment=ORT_DISABLE_TELEMETRY=1\n" in UNIT.read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/headwater/bin/edge-runtime", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert [line for line in done.stderr.splitlines() if UNIT.name in line] == []
