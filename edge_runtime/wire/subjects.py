"""The subjects and streams that messages travel on, in one place for both sides.

Invariants: a device's own subjects carry its name as one token; the learner takes the device from
the subject. Device and family names are checked here, so that no name can reach another's subject.

Implements proto/asyncapi.yaml (channels).
"""

from __future__ import annotations

import re

from edge_runtime.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

EVENTS_STREAM = "HW_EVENTS"
EVENTS_ALL = "hw.ev.*.*"
STATE_STREAM = "HW_STATE"
STATE_ALL = ["hw.wm.*", "hw.report.*", "hw.status.*"]
TRUST_STREAM = "HW_TRUST"
TRUST_ALL = ["hw.meta.>", "hw.blob.>"]
CANDIDATES_STREAM = "HW_CANDIDATES"
CANDIDATES_ALL = ["hw.candidate.>"]
GATE_SIGN = "hw.gate.sign"
GATE_APPROVE = "hw.gate.approve"
ROLLOUT = "hw.rollout"
REFRESH = "hw.cmd.refresh"
LEARNER_STATUS = "hw.status.learner"
TIME = "hw.time"


def checked_name(name: str, what: str) -> str:
    """`name` if it is 1-64 of letters, digits, '-' and '_'. Raises: ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "bad_name",
            f"{what} {name!r} is not a name",
            "use 1-64 letters, digits, '-' or '_', starting with a letter or digit",
        )
    return name


def events(device: str, event_class: str) -> str:
    """Where a device publishes its envelopes of a class."""
    return f"hw.ev.{device}.{event_class}"


def device_of(subject: str) -> str:
    """The device token of any per-device subject."""
    return subject.split(".")[2]


def watermark(device: str) -> str:
    """Where the learner says what it holds of a device."""
    return f"hw.wm.{device}"


def report(device: str) -> str:
    """Where a device publishes its reports."""
    return f"hw.report.{device}"


def inbox(device: str) -> str:
    """Below this subject a device's answers come, so that nobody else reads them."""
    return f"_INBOX_{device}"


def metadata(name: str) -> str:
    """Where a signed metadata file such as `3.snapshot.json` lies; `name` is its file name."""
    return f"hw.meta.{name.removesuffix('.json')}"


def chunk(sha256: str, index: int) -> str:
    """Where chunk `index` of the file with this hash lies."""
    return f"hw.blob.{sha256}.{index}"


def candidate_chunk(sha256: str, index: int) -> str:
    """Where chunk `index` of a package that is to be judged lies."""
    return f"hw.candidate.{sha256}.{index}"


def gate_judge(family: str) -> str:
    """Where a family's gate is asked to judge a candidate; `*` for all families."""
    return f"hw.gate.judge.{family}"


def submit(family: str) -> str:
    """Where an operator hands in a package; `*` for all families."""
    return f"hw.submit.{family}"


def approve(family: str) -> str:
    """Where an operator reads a family's plan, and consents to it; `*` for all families."""
    return f"hw.approve.{family}"


def answer(asker: str) -> str:
    """Where the answers to a cloud process's questions come; `asker` is a token of its own."""
    return f"hw.answer.{asker}"
