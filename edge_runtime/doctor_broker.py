"""The doctor's look at the way to the broker: root of trust, network, admission.

Why: these three are set up by three people; each finding says whose turn it is.

Invariants: looking changes nothing, here and at the broker. The bus is loaded only where there is a
broker to ask.

Knows nothing about the rest of the device.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Literal
from urllib.parse import urlsplit

from edge_runtime.config import EdgeConfig
from edge_runtime.errors import ConfigError, TransportError
from edge_runtime.wire import subjects

BROKER_S = 2.0

Seen = tuple[Literal["ok", "warn", "fail"], str, str]
"""The state, what was found, and what to do."""


def root(config: EdgeConfig) -> Seen:
    """Whether the trusted root is there, and is one."""
    if config.root is None:
        return "ok", "none needed: there is no broker", ""
    hint = "copy trust/root.json from the publisher's home to where root says"
    try:
        kind = json.loads(config.root.read_bytes())["signed"]["_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return "fail", f"{config.root}: {error}", hint
    return ("ok", str(config.root), "") if kind == "root" else ("fail", f"{kind}, no root", hint)


def broker(config: EdgeConfig) -> Seen:
    """Whether a NATS server answers where the configuration says."""
    if not config.nats:
        return "ok", "none: the device answers from its shelf and sends nothing", ""
    url = urlsplit(config.nats)
    hint = f"is nats-server running there, and does the network let you through to {url.netloc}?"
    try:
        with socket.create_connection((url.hostname, url.port or 4222), BROKER_S) as channel:
            first = channel.makefile("rb").readline(65536)
    except (OSError, ValueError) as error:
        return "fail", f"{config.nats}: {error}", hint
    if not first.startswith(b"INFO "):
        return "fail", f"{config.nats} is no NATS server: it says {first[:40]!r}", hint
    return "ok", f"{config.nats} answers", ""


def admission(config: EdgeConfig) -> Seen:
    """Whether the broker lets this device in and answers it, by the files that it would use."""
    if not config.nats:
        return "ok", "none needed: there is no broker", ""
    try:
        asyncio.run(_ask(config))
    except (ConfigError, TransportError) as error:
        return "fail", error.message, error.hint
    return "ok", f"{config.device} is admitted", ""


async def _ask(config: EdgeConfig) -> None:
    from edge_runtime.bus.access import of_device
    from edge_runtime.bus.nats import connect

    bus = await connect(config.nats, name="doctor", access=of_device(config))
    try:
        await bus.last(subjects.STATE_STREAM, subjects.watermark(config.device))
    except TransportError as error:
        if error.code != "no_stream":  # no learner was there yet
            raise
    finally:
        await bus.close()
