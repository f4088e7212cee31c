"""The processors: how many of them this process may use, what they can do, how they count.

Why: ONNX Runtime counts the host's cores and sees neither affinity nor a container's quota; threads
beyond those fight each other and are throttled together.

Invariants: at least one CPU is usable; what cannot be read limits nothing. Linux alone.

Source: cgroup-v2 (`cpu.max`) and sched-bwc (`cpu.cfs_quota_us`) in the kernel's documentation.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_FLAG_LINES = ("flags", "Features")  # x86-64, aarch64
_FLUSH = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}
"""Word of glibc's fenv_t that holds the flags, and the flags: FTZ and DAZ of MXCSR, FZ of FPCR."""


def usable(cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """How many CPUs affinity and quota leave; a quota of 1.5 is 1, since a second thread would be
    throttled half of the time.

    `cgroup` names the groups that the process is in, `root` is where they are mounted.
    """
    cpus = len(os.sched_getaffinity(0))
    return max(1, int(min([cpus, *_quotas(_text(cgroup), root)])))


def flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets that the kernel reports, such as `avx2`, `avx512_vnni`, `asimddp`."""
    for line in _text(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in _FLAG_LINES:
            return frozenset(value.split())
    return frozenset()


def flush_denormals() -> None:
    """Let the calling thread take numbers below 1.2e-38 for zero from now on: a model that meets
    them is many times slower otherwise. The state belongs to the thread, for all that it runs.

    ONNX Runtime's own setting reaches a thread only with the first session of a process.
    """
    if platform.machine() not in _FLUSH or platform.libc_ver()[0] != "glibc":
        return  # it costs time, no answers
    word, bits = _FLUSH[platform.machine()]
    libm, environment = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 16)()
    libm.fegetenv(environment)
    environment[word] |= bits
    libm.fesetenv(environment)


def _quotas(groups: str, root: Path) -> Iterator[float]:
    """The quota, in CPUs, of each group that has one; the groups above it hold a process too."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        unified = controllers == ""
        if unified or "cpu" in controllers.split(","):
            mount = root if unified else root / "cpu"
            inner = mount / path.lstrip("/")
            # In a container the path may be the host's: what is not there is passed over.
            for folder in (inner, *inner.parents[: len(inner.parts) - len(mount.parts)]):
                quota, period = _unified(folder) if unified else _separate(folder)
                if quota.isdecimal() and period.isdecimal() and int(period):
                    yield int(quota) / int(period)


def _unified(folder: Path) -> tuple[str, str]:
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    return quota, period


def _separate(folder: Path) -> tuple[str, str]:
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    quota, period = (_text(folder / name).strip() for name in names)
    return quota, period


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
