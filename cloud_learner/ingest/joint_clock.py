"""The joint clock: the event time up to which the records of all devices are in.

Why: which examples are mature must follow from what happened, not from which device's envelopes
came first; so time passes for the learner only once it has passed for every device.

Invariants: each family has a clock of its own, which only its own records move, as if it were
alone: one may replay years while another lives in the present. The clock never goes back. It stands
at the minimum over the devices that are not silent. A device's own time is the newest event time of
its class `event`; its labels hold it back while they lag, by at most one label window, since labels
travel in a class of their own; by any lag, while the device's last report says that more of them
are under way, of whatever family. A device (or class) that was silent for `idle_s` of wall time
holds nobody; a device that is awaited but was never heard holds the clock for the same time, and so
does one whose events come and get no newer: a clock that stands still must not stop everybody's. A
device whose labels are under way and stay away holds up its own unlabelled predictions for PATIENCE
times as long, and nobody else's.

Knows nothing about predictions or examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from cloud_learner.store.ingest_state import Account, Lane
from edge_runtime.wire.messages import EventClass

PATIENCE = 12
_NEVER = float("-inf")


class _Heard(msgspec.Struct):
    """Newest event time, and the monotonic time at which the class was heard last."""

    newest_s: float = _NEVER
    at_s: float = _NEVER


class _Device(msgspec.Struct):
    event: _Heard
    label: _Heard
    under_way: set[int]  # epochs of which labels are known to come


class JointClock:
    """Event time over all devices; `awaited` are those that must be heard before it starts."""

    def __init__(self, label_window_s: float, idle_s: float, awaited: Iterable[str] = ()) -> None:
        self.now_s = _NEVER
        self._label_window_s, self._idle_s = label_window_s, idle_s
        self._awaited = tuple(awaited)
        self._devices: dict[str, _Device] = {}

    def restore(
        self, now_s: float, family: str, accounts: Mapping[Lane, Account], monotonic_s: float
    ) -> None:
        """Go on at `now_s`; devices that were heard of `family` before count as heard right now."""
        self.now_s = now_s
        for device in self._awaited:
            self._device(device).event.at_s = monotonic_s
        for (device, _, event_class), account in accounts.items():
            self.hear(device, event_class, account.newest_s.get(family, _NEVER), monotonic_s)
        for (device, epoch, event_class), account in accounts.items():
            if event_class == "label":
                self.note(device, epoch, monotonic_s, is_under_way=account.durable > account.seq)

    def hear(
        self, device: str, event_class: EventClass, newest_s: float, monotonic_s: float
    ) -> None:
        """Records of a device came, the newest of all of its class at `newest_s`."""
        if newest_s == _NEVER:
            return  # nothing of it was accepted yet
        known = self._device(device)
        heard = getattr(known, event_class)
        if newest_s > heard.newest_s or event_class == "label":
            heard.at_s = monotonic_s
        heard.newest_s = max(heard.newest_s, newest_s)
        if known.label.at_s == _NEVER:
            known.label.at_s = monotonic_s  # its first labels may be on their way

    def note(self, device: str, epoch: int, monotonic_s: float, *, is_under_way: bool) -> None:
        """Whether labels of an epoch of a device are on their way, by its word and by what came."""
        known = self._device(device)
        if not is_under_way:
            known.under_way.discard(epoch)
            return
        if not known.under_way:  # waiting for them begins now, whenever the last ones came
            known.label.at_s = monotonic_s
        known.under_way.add(epoch)

    def advance(self, monotonic_s: float) -> float:
        """Move to where the devices stand now, and return that time."""
        holding = [
            self._time_of(device, self._idle_s, monotonic_s)
            for device in self._devices.values()
            if not self._is_silent(device.event, monotonic_s)
        ]
        self.now_s = max([self.now_s, min(holding, default=_NEVER)])
        return self.now_s

    def of(self, name: str, monotonic_s: float) -> float:
        """A device's own time; for ever in the past when it was never heard."""
        return self._time_of(self._device(name), PATIENCE * self._idle_s, monotonic_s)

    def _time_of(self, device: _Device, patience_s: float, monotonic_s: float) -> float:
        event_s, label_s = device.event.newest_s, device.label.newest_s
        if device.under_way and monotonic_s - device.label.at_s < patience_s:
            return min(event_s, label_s)
        if self._is_silent(device.label, monotonic_s):
            return event_s
        return min(event_s, max(label_s, event_s - self._label_window_s))

    def _is_silent(self, heard: _Heard, monotonic_s: float) -> bool:
        return monotonic_s - heard.at_s >= self._idle_s

    def _device(self, name: str) -> _Device:
        found = self._devices.get(name)
        if found is None:
            found = self._devices[name] = _Device(_Heard(), _Heard(), set())
        return found
