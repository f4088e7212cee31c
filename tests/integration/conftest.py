"""What integration tests share: a nats-server with a configuration of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud_learner.broker import find_server
from cloud_learner.children import spawn_tied

READY_S = 20.0


@pytest.fixture
def run_server(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`run_server(config)` starts a server with that text as its configuration; returns its url.

    It listens on loopback and has a store in tmp_path; `server` names another binary.
    """
    with contextlib.ExitStack() as servers:

        def run(config: str, server: Path | None = None) -> str:
            folder = tmp_path / f"server-{len(list(tmp_path.glob('server-*')))}"
            folder.mkdir()
            found = server or find_server(Path(sysconfig.get_path("scripts")), os.environ)
            text = f'listen: "127.0.0.1:-1"\nports_file_dir: {json.dumps(str(folder))}\n'
            text += f"jetstream {{ store_dir: {json.dumps(str(tmp_path / 'store'))} }}\n{config}"
            (folder / "server.conf").write_text(text)
            command = [str(found), "--config", str(folder / "server.conf")]
            with open(folder / "log", "wb") as log:
                child = spawn_tied(command, output=log.fileno())
            servers.callback(child.wait)
            servers.callback(child.kill)
            deadline_s = time.monotonic() + READY_S
            while child.poll() is None and time.monotonic() < deadline_s:
                with contextlib.suppress(IndexError, ValueError):
                    ports = next(iter(folder.glob("*.ports")), None)
                    if ports is not None:
                        return json.loads(ports.read_text())["nats"][0]
                time.sleep(0.01)
            raise AssertionError((folder / "log").read_text())

        yield run
