"""What the supervisor is told: ready, stopping, still alive.

Why: systemd starts what depends on the device only once it answers, and restarts a daemon whose
event loop hangs.

Invariants: without a supervisor, and when it cannot be reached, nothing happens: telling it must
never end what serves. The watchdog is fed by the event loop, so a loop that hangs feeds it no more.

Source: sd_notify(3) and sd_watchdog_enabled(3); a datagram of `KEY=value` lines to NOTIFY_SOCKET.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket

log = logging.getLogger("edge_runtime.notify")


def ready(status: str = "") -> None:
    """The device answers; `status` is what `systemctl status` shows."""
    _send("READY=1", *([f"STATUS={status}"] if status else []))


def stopping() -> None:
    """The end has begun."""
    _send("STOPPING=1")


async def watchdog() -> None:
    """Feed the watchdog of this process, twice in the time that it was given; ends at once when
    there is none, else runs until cancelled.
    """
    interval_s = watchdog_s() / 2
    while interval_s:
        _send("WATCHDOG=1")
        await asyncio.sleep(interval_s)


def watchdog_s() -> float:
    """After how many seconds of silence the supervisor would restart this process; 0.0: never."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    if not wanted.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(
        os.getpid()
    ):
        return 0.0
    return int(wanted) / 1_000_000


def _send(*lines: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract names begin with a zero byte
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            channel.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        log.warning("the supervisor was not told %s: %s", lines[0], error)
