"""What each device has confirmed, as it says: a floor that goes back gives a restored disk away.

Why: a device that was put back to last month's disk has forgotten what it confirmed since, and
believes metadata that it had left behind. Only who remembers for it can tell; and who said again
what it said before.

Invariants: what is remembered of a device only rises. One whose floor went back is named until
somebody takes it out of the file, also after it has caught up: what it believed meanwhile is not
known here. Nothing is taken from the device: a report is no more than a claim.

Durable state: `floors.json`, one rename at most once a minute; what a crash takes, the next report
tells again. Knows nothing about ingest, which tells two lives of a log by their epochs.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import msgspec

from edge_runtime.files import write_atomic
from edge_runtime.wire.messages import Report

log = logging.getLogger("cloud_learner")


class Remembered(msgspec.Struct):
    """The highest floor of a device, how often it went back from it, and when it last did; the
    highest epoch with the number of its last report, and the latest time that it said.
    """

    floor: list[int]
    went_back: int = 0
    last_s: float = 0.0
    below: bool = False
    number: tuple[int, int] = (0, 0)
    time_s: float = 0.0


class _File(msgspec.Struct):
    version: int
    devices: dict[str, Remembered]


class Floors:
    """The floors of all devices that report, kept in `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        self.devices = self._load()

    def hear(self, report: Report, now_s: float) -> None:
        """Compare with what the device said before; one that confirmed nothing says nothing new."""
        known = self.devices.setdefault(report.device, Remembered([]))
        floor = report.floor
        if floor < known.floor:
            if not known.below:
                known.went_back, known.last_s, self._changed = known.went_back + 1, now_s, True
                log.warning(
                    "%s confirmed %s once and says %s now: an older copy of its disk was put back",
                    *(report.device, known.floor, floor),
                )
            known.below = True
            return
        known.below = False
        if floor > known.floor:
            known.floor, self._changed = floor, True

    def is_news(self, report: Report) -> bool:
        """Whether a report is newer than all before it of its device, which it is then one of."""
        known = self.devices.setdefault(report.device, Remembered([]))
        number = report.epoch, report.number
        is_later = known.time_s < report.time_s < math.inf
        if number <= known.number and not is_later:
            return False
        known.number, self._changed = max(number, known.number), True
        if is_later:
            known.time_s = report.time_s
        return True

    def restored(self) -> dict[str, dict[str, float]]:
        """The devices whose floor went back: how often, when last, and whether it still is."""
        return {
            device: {"times": each.went_back, "last_s": each.last_s, "below": int(each.below)}
            for device, each in sorted(self.devices.items())
            if each.went_back
        }

    def save(self) -> None:
        """Store what changed. Raises: OSError, and it is stored the next time."""
        if not self._changed:
            return
        self._changed = False
        try:
            write_atomic(self._path, msgspec.json.encode(_File(1, self.devices)))
        except OSError:
            self._changed = True
            raise

    def _load(self) -> dict[str, Remembered]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_File).devices
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.warning("what devices confirmed is learned anew: %s: %s", self._path, error)
            return {}
