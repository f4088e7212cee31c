"""The servers of tools/bench-serving: real processes, measured from outside, ended by their id.

Invariants: every server listens on loopback or on a Unix socket, in a folder of its own, with ONNX
Runtime's telemetry off; none outlives the tool. Knows nothing of what they are asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench_serving_client import Address
from bench_serving_model import FAMILY

from cloud_learner.broker import Broker
from cloud_learner.children import spawn_tied
from cloud_learner.release import keys
from edge_runtime import factory

TOOLS = Path(__file__).resolve().parent
PEERS = TOOLS.parent / "var" / "peers"
ENV = "/usr/bin/env"
READY_S, STOP_S = 60.0, 15.0
EDGE_RUNTIME = [sys.executable, "-m", "edge_runtime.cli"]


class Server:
    """A child process, its descendants, and the addresses it answers at."""

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log.txt"
        settings = {"ORT_DISABLE_TELEMETRY": "1", **environment}
        command = [ENV, "-C", str(folder), *(f"{k}={v}" for k, v in settings.items()), *command]
        with open(self._log, "wb") as output:
            self._child = spawn_tied(command, output=output.fileno())

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait(self, ready: Callable[[], bool]) -> None:
        """Return once `ready` says so. Raises: RuntimeError with the end of the server's log."""
        try:
            until(ready, self._child)
        except TimeoutError as error:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self._child.args} is not ready:\n{tail}") from error

    def rss_mb(self) -> float:
        """Resident memory of all its processes, summed."""
        return sum(rss_mb(pid) for pid in self._family())

    def cpu_s(self) -> float:
        """Processor time that its threads have used."""
        return sum(
            int((task / "schedstat").read_text().split()[0]) / 1e9
            for pid in self._family()
            for task in Path(f"/proc/{pid}/task").iterdir()
        )

    @contextlib.contextmanager
    def on_core(self, core: int, *, shared: bool = False) -> Iterator[None]:
        """All its threads on one core, and this process on the others, or on the same one where it
        is `shared`; undone at the end.
        """
        before = os.sched_getaffinity(0)
        self._pin({core})
        os.sched_setaffinity(0, {core} if shared else before - {core} or before)
        try:
            yield
        finally:
            self._pin(before)
            os.sched_setaffinity(0, before)

    def stop(self) -> None:
        """SIGTERM, then what is left of it is killed, by process id."""
        family = self._family()
        self._child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(STOP_S)
        for pid in family[1:] if self._child.poll() is not None else family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._child.wait()

    def _pin(self, cores: set[int]) -> None:
        for pid in self._family():
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cores)

    def _family(self) -> list[int]:
        """Its process ids, its own first."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        found = [self.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found


class Started(contextlib.ExitStack):
    """Servers that are up, each at its address; all are stopped at the end.

    `package` is what each of them serves, `home` where their folders are made, `peers` where the
    peers are installed.
    """

    def __init__(self, package: Path, home: Path, peers: Path = PEERS) -> None:
        super().__init__()
        self._package, self._home, self._peers = package, home, peers

    def device(self) -> tuple[Server, str, Address]:
        """`edge-runtime run --package`: its Unix socket, and its HTTP port."""
        path, port = str(self._home / "device.sock"), free_port()
        command = [*EDGE_RUNTIME, "run", "--package", str(self._package)]
        command += ["--socket", path, "--http", str(port)]
        server = self._start("device", command)
        server.wait(lambda: reachable(path) and reachable(("127.0.0.1", port)))
        return server, path, ("127.0.0.1", port)

    def device_with_broker(self) -> tuple[Server, str]:
        """A device as in the field: uplink, update client and agent run, a broker answers."""
        home = self._home / "fielded"
        broker = self.enter_context(Broker.start(home / "broker"))
        keys.create(home / "keys", [FAMILY])
        info = factory.inspect(self._package)
        config = factory.write_config(
            home / "edge.toml", info, device="bench", nats=broker.url, root="keys/trust/root.json"
        )
        with open(home / "edge.toml", "a", encoding="utf-8") as file:
            file.write("\n[http]\nport = 0\n")
        factory.install(config, self._package, info)
        command = [*EDGE_RUNTIME, "run", "--config", str(home / "edge.toml")]
        server = self._start("fielded", command)
        server.wait(lambda: reachable(str(config.socket)))
        return server, str(config.socket)

    def echo(self) -> tuple[Server, str]:
        """A uvloop server that sends back what comes."""
        path = str(self._home / "echo.sock")
        server = self._start("echo", [sys.executable, str(TOOLS / "bench_serving_echo.py"), path])
        server.wait(lambda: reachable(path))
        return server, path

    def mosec_json(self) -> tuple[Server, Address]:
        """One worker that speaks JSON. Raises: as `mosec`."""
        return self.mosec("json")

    def mosec(self, form: str = "msgpack") -> tuple[Server, Address]:
        """One worker. Raises: FileNotFoundError when it is not installed."""
        port = free_port()
        command = [
            self._python("mosec"),
            str(TOOLS / "bench_serving_mosec.py"),
            "--log-level",
            "warning",
        ]
        command += ["--address", "127.0.0.1", "--port", str(port)]
        server = self._start(f"mosec-{form}", command, MODEL=str(self._package), FORMAT=form)
        server.wait(lambda: b" 200 " in _get(port, "/metrics"))
        return server, ("127.0.0.1", port)

    def mlserver(self) -> tuple[Server, Address]:
        """One model in the server's own process, the faster of its two ways.

        Raises: FileNotFoundError when it is not installed.
        """
        port, home = free_port(), self._home / "mlserver"
        model = {
            "name": FAMILY,
            "implementation": "bench_serving_mlserver.Model",
            "parameters": {"uri": str(self._package)},
        }
        settings = {
            "host": "127.0.0.1",
            "http_port": port,
            "grpc_port": free_port(),
            "metrics_port": free_port(),
            "parallel_workers": 0,
            "debug": False,
        }
        python = self._python("mlserver")
        home.mkdir()
        (home / "settings.json").write_text(json.dumps(settings))
        (home / "model-settings.json").write_text(json.dumps(model))
        command = [str(Path(python).with_name("mlserver")), "start", "."]
        server = self._start("mlserver", command, PYTHONPATH=str(TOOLS))
        server.wait(lambda: b" 200 " in _get(port, f"/v2/models/{FAMILY}/ready"))
        return server, ("127.0.0.1", port)

    def _python(self, peer: str) -> str:
        python = self._peers / peer / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(f"{peer} is not installed: make bench-peers")
        return str(python)

    def _start(self, name: str, command: list[str], **environment: str) -> Server:
        server = Server(command, self._home / name, **environment)
        self.callback(server.stop)
        return server


def _get(port: int, path: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as probe:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        probe.sendall(request.encode())
        return probe.recv(4096)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def reachable(address: Address) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        probe.connect(address)
    return True


def until(ready: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    """Return once `ready` says so. Raises: TimeoutError when the child ends, or it takes ages."""
    deadline_s = time.monotonic() + READY_S
    while not _is(ready):
        if child.poll() is not None or time.monotonic() > deadline_s:
            raise TimeoutError
        time.sleep(0.001)


def _is(ready: Callable[[], bool]) -> bool:
    try:
        return ready()
    except OSError:
        return False


def rss_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return 0.0
