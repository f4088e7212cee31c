"""What a trial was told, as lines: from them its decisions can be come to again.

Why: a decision that nobody can check is an opinion. A trial begins with a header, the state before
it, and goes on with all that moved it: its offer, labels as both arms answered them, reports as
they were signed, what people said, and moments of time.

Invariants: a line carries what evidence reads and no feature of anybody. Each line goes into a
chain of digests, whose last link stands in the signed plan of each decision: a line that is
changed, left out or added no longer fits it. A journal has a bound; what comes after it is in the
chain and not in the file.

Knows nothing about files, and nothing about what a line leads to.
"""

from __future__ import annotations

import hashlib

import msgspec

from cloud_learner.rollout.control import Control
from cloud_learner.rollout.state import Offer, Rules, State, Told
from cloud_learner.store.examples import Example
from edge_runtime.errors import RequestError
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Report

JOURNAL_VERSION = 1
JOURNAL_BYTES_MAX = 64 << 20


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The state in which a trial began, and its rules."""

    version: int = JOURNAL_VERSION
    state: State
    rules: Rules


class Signed(msgspec.Struct, frozen=True):
    """A report as it came: its bytes, and the device's signature of them."""

    body: bytes
    signature: bytes


class Fed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a trial was told at `now_s`: one of these, or nothing but the time.

    `members` is on how many devices it was then, as far as they were known. Of a contest,
    `answered` says how often each release has since the plan before.
    """

    now_s: float
    offer: Offer | None = None
    example: Example | None = None
    answered: list[int] | None = None
    report: Report | None = None
    signed: Signed | None = None
    control: Control | None = None
    members: int = 0

    @classmethod
    def of_report(cls, now_s: float, members: int, report: Report, signed: Signed | None) -> Fed:
        """A report, in the form in which its signature can be checked where it has one.

        One that tells of sessions is kept without what it tells of them, and so without signature.
        """
        if signed is not None and not report.moments:
            return cls(now_s=now_s, members=members, signed=signed)
        bare = msgspec.structs.replace(report, sketches=[], moments=[])
        return cls(now_s=now_s, members=members, report=bare)

    def told(self) -> Report | None:
        """The report in it. Raises: RequestError when a signed one is none."""
        return self.report if self.signed is None else codec.decode_report(self.signed.body)


def slim(example: Example) -> Example:
    """What evidence reads of an example."""
    return msgspec.structs.replace(example, features=b"", fields={})


def add(trial: Told, line: bytes) -> bool:
    """Chain a line of the journal to those before it; whether the file has room for it."""
    trial.digest = hashlib.sha256(trial.digest.encode() + line).hexdigest()
    if trial.journal_bytes + len(line) >= JOURNAL_BYTES_MAX:
        return False
    trial.journal_bytes += len(line) + 1
    return True


def header_of(line: bytes) -> Header:
    """The first line of a journal. Raises: RequestError `bad_journal`."""
    try:
        header = msgspec.json.decode(line, type=Header)
    except (msgspec.DecodeError, ValueError) as error:
        raise RequestError("bad_journal", f"its first line cannot be read: {error}") from error
    if header.version != JOURNAL_VERSION:
        raise RequestError("bad_journal", f"it has version {header.version}")
    return header


def fed_of(line: bytes) -> Fed:
    """Any other line. Raises: RequestError `bad_journal`."""
    try:
        return msgspec.json.decode(line, type=Fed)
    except (msgspec.DecodeError, ValueError) as error:
        raise RequestError("bad_journal", f"a line cannot be read: {error}") from error
