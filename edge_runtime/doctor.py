"""The doctor: looks at what a device stands on, and says what to do about what is wrong.

Why: a device is set up far from those who know it; each thing that it needs can be looked at before
it is missed.

Invariants: looking changes nothing: what is written to be measured is gone at once. A check never
raises; that it cannot look is what it finds. `fail` means that something the device is told to do
will not work, `warn` that it works worse than it could.

Knows nothing about a running daemon but that its socket answers.
"""

from __future__ import annotations

import grp
import importlib.util
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from edge_runtime import config as configuration
from edge_runtime import cpus
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.config import EdgeConfig
from edge_runtime.doctor_broker import BROKER_S, Seen
from edge_runtime.doctor_broker import admission as _admission
from edge_runtime.doctor_broker import broker as _broker
from edge_runtime.doctor_broker import root as _root
from edge_runtime.errors import ConfigError

PYTHON_MIN = (3, 11)
GLIBC_MIN = (2, 28)
FSYNC_MS_MAX = 100.0
_FSYNCS = 16
_TELLING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
_VOLATILE = ("tmpfs", "ramfs")

# A model of one node. In a process of its own, because what is imported stays; with a home of its
# own, because what ONNX Runtime notes about its use goes there. BLAS is told to start no threads,
# so that others show.
_LOOK_AT_ORT = """
import base64, json, os
from edge_runtime.inference import runner
one_node = "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoA"
runner.ort.InferenceSession(base64.b64decode(one_node + "EA0="))
files = [name for _, _, names in os.walk(os.environ["HOME"]) for name in names]
print(json.dumps([runner.ort.__version__, len(os.listdir("/proc/self/task")) - 1, len(files)]))
"""


class Finding(msgspec.Struct, frozen=True):
    """What a check found out about `what`; `hint` says what to do where not all is well."""

    what: str
    state: Literal["ok", "warn", "fail"]
    text: str
    hint: str = ""


def examine(config_path: Path, clock: Clock | None = None) -> list[Finding]:
    """Every check, in order; without a valid configuration, those of the machine alone."""
    now = clock or SystemClock()
    findings = [
        _looked("python", _python),
        _looked("glibc", _glibc),
        _looked("cpu", _cpu),
        _looked("onnxruntime", _onnxruntime),
        _looked("clock", lambda: _clock(now, Path(__file__))),
    ]
    if not config_path.exists():
        hint = f"edge-runtime init --config {config_path}, or edge-runtime run --package FILE.onnx"
        return [*findings, Finding("configuration", "warn", f"{config_path}: no such file", hint)]
    try:
        config = configuration.load(config_path)
    except ConfigError as error:
        return [*findings, Finding("configuration", "fail", error.message, error.hint)]
    return [
        *findings,
        Finding("configuration", "ok", f"{config_path}: device {config.device}"),
        _looked("state", lambda: _state(config)),
        _looked("disk", lambda: _disk(config)),
        _looked("socket", lambda: _socket(config)),
        _looked("http", lambda: _http(config)),
        _looked("root", lambda: _root(config)),
        _looked("broker", lambda: _broker(config)),
        _looked("admission", lambda: _admission(config)),
    ]


def told(findings: list[Finding]) -> str:
    """The findings for a person, one a line, what to do below."""
    lines = []
    for each in findings:
        lines.append(f"{each.state:<5} {each.what:<14} {each.text}")
        if each.hint:
            lines.append(f"{'':<5} {'':<14} hint: {each.hint}")
    return "\n".join(lines)


def _looked(what: str, look: Callable[[], Seen]) -> Finding:
    try:
        return Finding(what, *look())
    except Exception as error:
        text = f"cannot be looked at: {type(error).__name__}: {error}"
        return Finding(what, "fail", text, "mend what the message names")


# The machine.


def _python(version: tuple[int, ...] = sys.version_info[:3]) -> Seen:
    text = f"{_dotted(version)} at {sys.executable}"
    if version < PYTHON_MIN:
        return "fail", text, f"install Python {_dotted(PYTHON_MIN)} or newer"
    return "ok", text, ""


def _glibc(version: str | None = None) -> Seen:
    """`version` is as the C library says it, such as `glibc 2.36`; other libraries have none."""
    if version is None:
        names = os.confstr_names
        version = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in names else ""
    name, _, number = (version or "").partition(" ")
    hint = f"use a distribution with glibc {_dotted(GLIBC_MIN)} or newer; musl will not do"
    if name != "glibc":
        return "fail", "not the C library here; ONNX Runtime has wheels for no other", hint
    old = tuple(map(int, number.split(".")[:2])) < GLIBC_MIN
    return ("fail", number, hint) if old else ("ok", number, "")


def _cpu(flags: frozenset[str] | None = None, machine: str = platform.machine()) -> Seen:
    flags = cpus.flags() if flags is None else flags
    telling = " ".join(name for name in _TELLING if name in flags) or "no vector units known"
    text = f"{machine}, {cpus.usable()} of {os.cpu_count()} usable; {telling}"
    if machine not in {"x86_64", "aarch64"}:
        return "fail", text, "use x86-64 or aarch64: ONNX Runtime has wheels for no other"
    if not flags & {"avx2", "asimd"}:
        return "warn", text, "expect slow models; a virtual machine may hide what its host has"
    return "ok", text, ""


def _onnxruntime() -> Seen:
    with tempfile.TemporaryDirectory(prefix="headwater-") as home:
        places = {"HOME": home, "XDG_CACHE_HOME": home, "OPENBLAS_NUM_THREADS": "1"}
        looked = subprocess.run(
            [sys.executable, "-c", _LOOK_AT_ORT],
            env=os.environ | places | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    if looked.returncode:
        last = (looked.stderr.strip().splitlines() or [f"exit code {looked.returncode}"])[-1]
        return "fail", f"does not start: {last}", "pip install --force-reinstall onnxruntime"
    version, threads, files = json.loads(looked.stdout)
    if threads or files:
        text = f"{version}; reports its use: {threads} threads, {files} files"
        return "warn", text, "unset ORT_DISABLE_TELEMETRY, or set it to 1"
    return "ok", f"{version}; reports nothing: no thread, no file", ""


def _clock(clock: Clock, built: Path) -> Seen:
    """A clock that stands before the time at which `built` was written is wrong."""
    before_s = clock.monotonic_s()
    now_s, built_s = clock.now_s(), built.stat().st_mtime
    utc = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    if now_s < built_s:
        hint = "set the clock, as with timedatectl set-ntp true; signatures and labels need it"
        return "fail", f"{utc} is before this software was installed", hint
    if clock.monotonic_s() < before_s:
        return "fail", "the monotonic clock goes back", "change the machine's clock source"
    return "ok", utc, ""


# What the configuration names.


def _state(config: EdgeConfig) -> Seen:
    folder = _standing(config.state_dir)
    if not os.access(folder, os.W_OK | os.X_OK):
        return "fail", f"{folder} cannot be written", f"chown it to user {os.getuid()}"
    if (kind := _file_system(folder)) in _VOLATILE:
        return "warn", f"{folder} is on {kind}", "put state_dir on a disk that outlives a restart"
    return "ok", f"{config.state_dir} on {kind}", ""


def _disk(config: EdgeConfig) -> Seen:
    folder = _standing(config.state_dir)
    kept = sum(path.stat().st_size for path in (config.state_dir / "log").glob("*"))
    missing = (config.log.bytes_max_mb << 20) - kept - shutil.disk_usage(folder).free
    cost_ms = _fsync_ms(folder)
    text = f"{shutil.disk_usage(folder).free >> 20} MB free; making durable takes {cost_ms:.1f} ms"
    if missing > 0:
        return "warn", text, f"free {missing >> 20} MB, or lower log.bytes_max_mb"
    if cost_ms > FSYNC_MS_MAX:
        return "warn", text, "use a faster disk: a power cut may take what came in that time"
    return "ok", text, ""


def _fsync_ms(folder: Path) -> float:
    """The median cost of making 4 KB durable, in milliseconds; the file has no name."""
    costs = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_FSYNCS):
            file.write(bytes(4096))
            file.flush()
            started_s = time.perf_counter()
            os.fdatasync(file.fileno())
            costs.append(1000 * (time.perf_counter() - started_s))
    return statistics.median(costs)


def _socket(config: EdgeConfig) -> Seen:
    for path in filter(None, (config.socket, config.http.socket)):
        if not path.parent.is_dir():
            return "fail", f"{path.parent} is missing", f"mkdir -p {path.parent}"
        if not os.access(path.parent, os.W_OK | os.X_OK):
            hint = f"let user {os.getuid()} write there"
            return "fail", f"{path.parent} cannot be written", hint
        if path.exists() and not path.is_socket():
            return "fail", f"{path} is no socket", "choose another path, or move what is there"
    group = config.socket_group
    if group and group not in {each.gr_name for each in grp.getgrall()}:
        return "fail", f"no group {group!r}", f"groupadd {group}, or mend socket_group"
    running = "a device answers there" if _answers(config.socket) else "nobody answers there now"
    return "ok", f"{config.socket}, mode {config.socket_mode}; {running}", ""


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(BROKER_S)
        return channel.connect_ex(str(path)) == 0


def _http(config: EdgeConfig, needed: tuple[str, ...] = ("httptools",)) -> Seen:
    if not config.http.enabled:
        return "ok", "not served", ""
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        return "fail", f"{' and '.join(missing)} missing", "pip install 'headwater[http]'"
    return "ok", f"port {config.http.port}, socket {config.http.socket}", ""


def _standing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def _file_system(path: Path) -> str:
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted, _, kind = line.partition(" - ")
        if mounted.split()[2] == wanted:
            return kind.split()[0]
    return "an unknown file system"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
