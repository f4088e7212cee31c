"""Child processes that never outlive the process that started them.

Why: a broker, a device or a learner that goes on alone holds a store or a socket that the next one
needs, and nobody would know of it.

Invariants: the kernel kills the child when its parent dies, in whatever way.

Knows nothing about what the children do.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future

# Runs in a fresh interpreter between fork and exec, where it is safe to call into libc.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def spawn_tied(
    command: Sequence[str], *, output: int = subprocess.DEVNULL, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a child that is killed when this process dies, with stdout and stderr to `output`.

    It is started from a thread of its own, which lives as long as the child does: Linux sends the
    death signal when the thread that forked ends, not the process. Raises: OSError.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
    started: Future[subprocess.Popen[bytes]] = Future()

    def run() -> None:
        try:
            child = subprocess.Popen(
                launcher,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                process_group=0,  # an interrupt at the terminal is for the parent to handle
            )
            pidfd = os.pidfd_open(child.pid)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(child)
        select.select([pidfd], [], [])
        os.close(pidfd)

    threading.Thread(target=run, name="child", daemon=True).start()
    return started.result()
