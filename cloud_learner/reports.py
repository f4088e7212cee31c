"""Which reports of devices are believed: those that the device itself said, each once.

Why: campaigns decide by what devices say. The broker lets each device speak on its own subject
alone, but a broker can be hostile, and what was said once can be said again by anybody who heard.

Invariants: a report of a device whose key is known counts only with its signature over subject and
content. A report counts only if it is newer than all that were heard of its device: by its number,
or by its time, since the numbers begin anew on a disk that was put back or wiped. So nothing that
was heard once ever counts again. What does not count is counted, by its reason.

Knows nothing about what reports say, nor about their effects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from edge_runtime.bus.base import Message
from edge_runtime.bus.nkey import is_signed
from edge_runtime.errors import RequestError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import Report


class Reports:
    """Hears reports; `keys` gives the public keys of devices now, `is_news` remembers what was."""

    def __init__(
        self, keys: Callable[[], Mapping[str, str]], is_news: Callable[[Report], bool]
    ) -> None:
        self._keys, self._is_news = keys, is_news
        self._counts = Counter(
            bad_reports=0, unsigned_reports=0, forged_reports=0, replayed_reports=0
        )

    def believed(self, message: Message) -> Report | None:
        """The report in `message`, if it counts."""
        reason, report = self._judged(message)
        if reason:
            self._counts[f"{reason}_reports"] += 1
            return None
        return report

    def statistics(self) -> dict[str, int]:
        """How many did not count: unreadable or of another device, unsigned, forged, replayed."""
        return dict(self._counts)

    def _judged(self, message: Message) -> tuple[str, Report | None]:
        device = subjects.device_of(message.subject)
        key, signature = self._keys().get(device), codec.signature_in(message.headers)
        if key is not None and signature is None:
            return "unsigned", None
        if key is not None and signature is not None:
            signed = codec.signed_report(message.subject, message.data)
            if not is_signed(signed, signature, key):
                return "forged", None
        try:
            report = codec.decode_report(message.data)
        except RequestError:
            return "bad", None
        if report.device != device:
            return "bad", None
        return ("", report) if self._is_news(report) else ("replayed", None)
