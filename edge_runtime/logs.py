"""What the process says of itself on stderr: lines for people, or one JSON object per line.

Why: a person reads a terminal, a fleet's collector reads fields; set up once, by the command.

Invariants: one record is one line of JSON, whatever its text holds. Its keys are stable: `time`
(UTC, ISO 8601, microseconds), `level`, `logger`, `message`, and `exception` where there is one.

Knows nothing about who logs what.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

import msgspec

_TEXT = "%(asctime)s %(levelname)s %(message)s"


def setup(format: str = "text", level: str = "info", stream: TextIO | None = None) -> None:  # noqa: A002
    """Let all loggers write to `stream` (None: stderr) as `format`, from `level` on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _JsonFormatter(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said).decode()
