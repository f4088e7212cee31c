"""The embedded broker as a real child process: it starts, dies with its parent, keeps its data."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cloud_learner.broker import Broker
from cloud_learner.nats_server import find_server
from edge_runtime.bus.nats import connect
from edge_runtime.errors import ConfigError

WAIT_S = 10.0
ROOT = Path(__file__).parents[2]
MB = 1 << 20


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with Broker.start(tmp_path / "broker") as running:
        yield running


def ends(pidfd: int) -> bool:
    """Whether the process behind `pidfd` ends in time."""
    readable, _, _ = select.select([pidfd], [], [], WAIT_S)
    os.close(pidfd)
    return bool(readable)


def address(broker: Broker) -> tuple[str, int]:
    parts = urlsplit(broker.url)
    return str(parts.hostname), int(parts.port or 0)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def store(broker: Broker, body: bytes) -> None:
    bus = await connect(broker.url, name="writer")
    await bus.ensure_stream("KEPT", ["kept.>"], max_bytes=MB, discard_new=True)
    await bus.publish("kept.a", body)
    await bus.close()


async def stored(broker: Broker) -> bytes | None:
    bus = await connect(broker.url, name="reader")
    message = await bus.last("KEPT", "kept.a")
    await bus.close()
    return message and message.data


def test_a_later_server_on_the_store_listens_where_the_last_one_did_if_it_can(tmp_path):
    with Broker.start(tmp_path) as first:
        url = first.url
    with Broker.start(tmp_path) as second:
        assert second.url == url
    port = int(url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), Broker.start(tmp_path) as third:
        assert third.url != url


def test_it_is_ready_when_start_returns_and_gone_when_stop_returns(tmp_path):
    broker = Broker.start(tmp_path / "made" / "on demand")
    host, port = address(broker)
    assert host == "127.0.0.1"
    with socket.create_connection((host, port), timeout=WAIT_S) as client:
        assert client.recv(4) == b"INFO"
    assert broker.running
    pid = broker.pid
    broker.stop()
    broker.stop()
    assert not broker.running
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=WAIT_S)


def test_it_has_its_own_process_group(broker):
    assert os.getpgid(broker.pid) == broker.pid


def test_it_dies_with_a_parent_that_is_killed(tmp_path):
    script = (
        "import sys; from pathlib import Path; from cloud_learner.broker import Broker\n"
        "print(Broker.start(Path(sys.argv[1])).pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "broker")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        assert ends(child)
    Broker.start(tmp_path / "broker").stop()


def test_a_second_broker_on_the_same_store_is_refused(broker, tmp_path):
    with pytest.raises(ConfigError) as caught:
        Broker.start(tmp_path / "broker")
    assert caught.value.code == "already_owned"
    assert broker.running


@pytest.mark.parametrize("crash", [False, True], ids=["restart", "kill"])
def test_a_restart_keeps_the_port_and_the_data(broker, crash):
    asyncio.run(store(broker, b"kept"))
    url, pid = broker.url, broker.pid
    if crash:
        broker.kill()
        assert not broker.running
    broker.restart()
    assert broker.url == url
    assert broker.pid != pid
    assert asyncio.run(stored(broker)) == b"kept"


def test_a_start_on_an_old_store_keeps_the_data(tmp_path):
    with Broker.start(tmp_path) as broker:
        asyncio.run(store(broker, b"kept"))
    with Broker.start(tmp_path) as broker:
        assert asyncio.run(stored(broker)) == b"kept"


def test_a_client_goes_on_after_a_restart(broker):
    async def scenario() -> None:
        back = asyncio.Event()
        bus = await connect(broker.url, name="test", on_reconnect=back.set)
        await bus.ensure_stream("S", ["s.>"], max_bytes=MB, discard_new=True)
        async with bus.pull("S", "reader", "s.>") as reader:
            await bus.publish("s.a", b"before")
            (before,) = await reader.next_batch(1, WAIT_S)
            await before.ack()
            await asyncio.to_thread(broker.restart)
            await asyncio.wait_for(back.wait(), WAIT_S)
            await bus.publish("s.a", b"after")
            bodies = [before.data]
            while bodies[-1] != b"after":
                bodies += [message.data for message in await reader.next_batch(5, WAIT_S)]
        await bus.close()
        assert set(bodies) == {b"before", b"after"}

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_start_that_fails_says_why(broker):
    host, port = address(broker)
    broker.kill()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen()
        with pytest.raises(ConfigError) as caught:
            broker.restart()
    assert caught.value.code == "broker_failed"
    assert "address already in use" in caught.value.message


def test_a_missing_server_is_a_clear_error(tmp_path):
    environ = {"PATH": str(tmp_path), "NATS_SERVER": str(tmp_path / "nowhere")}
    with pytest.raises(ConfigError) as caught:
        find_server(tmp_path, environ)
    assert caught.value.code == "no_nats_server"
    assert str(tmp_path / "nowhere") in caught.value.message
    assert "pip install" in caught.value.hint


def test_the_server_next_to_the_interpreter_comes_first_then_the_named_then_path(tmp_path):
    new = "echo nats-server: v2.15.1"
    on_path = executable(tmp_path / "path" / "nats-server", new)
    environ = {"PATH": str(on_path.parent)}
    assert find_server(tmp_path / "scripts", environ) == on_path
    named = executable(tmp_path / "named" / "server", new)
    environ["NATS_SERVER"] = str(named)
    assert find_server(tmp_path / "scripts", environ) == named
    beside = executable(tmp_path / "scripts" / "nats-server", new)
    assert find_server(tmp_path / "scripts", environ) == beside


@pytest.mark.parametrize(
    ("says", "code"),
    [
        ("echo nats-server: v2.14.5", "old_nats_server"),
        ("echo something else", "old_nats_server"),
        ("exit 3", "no_nats_server"),
    ],
)
def test_a_server_that_cannot_be_trusted_with_data_is_refused(tmp_path, says, code):
    executable(tmp_path / "nats-server", says)
    with pytest.raises(ConfigError) as caught:
        find_server(tmp_path, {})
    assert caught.value.code == code


def test_killing_the_child_is_seen(broker):
    child = os.pidfd_open(broker.pid)
    os.kill(broker.pid, signal.SIGKILL)
    assert ends(child)
    assert not broker.running
