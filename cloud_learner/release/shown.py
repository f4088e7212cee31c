"""What the broker shows in the place of what was published last.

Why: whoever writes to the broker can lay metadata over the genuine ones. Devices refuse them, and
get nothing newer until somebody publishes: where a rollout waits for those devices, never.

Knows nothing about what is signed.
"""

from __future__ import annotations

from edge_runtime.bus.base import Bus
from edge_runtime.errors import TransportError
from edge_runtime.wire import subjects


async def shown_instead(bus: Bus, timestamp: str) -> bytes | None:
    """The timestamp that the broker shows instead of `timestamp`, empty where it has none; None
    where it shows that one, or does not answer.
    """
    try:
        found = await bus.last(subjects.TRUST_STREAM, subjects.metadata("timestamp.json"))
    except TransportError:
        return None
    data = b"" if found is None else found.data
    return None if data == timestamp.encode() else data
