"""The messages of the Unix socket about sessions: each request names the session that it is about.

Why: an application that asks over the socket has the words that `Runtime.session` has in process.

Invariants: as in `frames`, which sends and reads them; a session's key is in requests alone, and no
reply and no error repeats it.

Knows no bytes, sockets or models, and loads no numpy. Implements proto/socket.md (Sessions).
"""

from __future__ import annotations

import msgspec

Fields = dict[str, str | int | float | bool | None]  # the last two to be refused by name


class SessionPredict(msgspec.Struct, array_like=True, frozen=True, tag=8, gc=False):
    """Answer this event as the session has learned to."""

    request_id: int
    family: str
    key: str
    kind: str
    time_s: float
    fields: Fields


class SessionRank(msgspec.Struct, array_like=True, frozen=True, tag=9, gc=False):
    """Which `k` of `candidates` to show, in which order; each completes the event's fields.

    `features` are float32, little-endian, one row for each candidate, in place of what the device
    would work out from the fields.
    """

    request_id: int
    family: str
    key: str
    kind: str
    time_s: float
    fields: Fields
    candidates: list[Fields]
    k: int
    features: bytes | None = None


class SessionLabel(msgspec.Struct, array_like=True, frozen=True, tag=10, gc=False):
    """What turned out to be true, for log and session; `time_s` None means now."""

    request_id: int
    family: str
    key: str
    prediction_id: str
    value: float
    time_s: float | None = None
    final: bool = True


class SessionExplain(msgspec.Struct, array_like=True, frozen=True, tag=11, gc=False):
    """What has the session learned?"""

    request_id: int
    family: str
    key: str


class SessionReset(msgspec.Struct, array_like=True, frozen=True, tag=12, gc=False):
    """Let the session answer as the model does, and learn anew."""

    request_id: int
    family: str
    key: str


class SessionClose(msgspec.Struct, array_like=True, frozen=True, tag=13, gc=False):
    """The session is over: forget it."""

    request_id: int
    family: str
    key: str


class ForgetSessions(msgspec.Struct, array_like=True, frozen=True, tag=14, gc=False):
    """Forget all sessions of a family at once; empty: of every family."""

    request_id: int
    family: str = ""


class SessionPredicted(msgspec.Struct, array_like=True, frozen=True, tag=136, gc=False):
    """The answer to SessionPredict; `base` is what the models alone would have said."""

    request_id: int
    id: str
    outputs: list[float]
    release: str
    arm: str
    base: list[float]
    adapted: bool


class Place(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A candidate that was ranked: `index` into the candidates, `chance` of standing where it does.

    `score` is what the session makes of it, `base` what the model does.
    """

    id: str
    index: int
    score: float
    base: float
    chance: float
    release: str
    arm: str


class SessionRanked(msgspec.Struct, array_like=True, frozen=True, tag=137, gc=False):
    """The answer to SessionRank: what to show, in this order."""

    request_id: int
    places: list[Place]


class SessionLabelled(msgspec.Struct, array_like=True, frozen=True, tag=138, gc=False):
    """The answer to SessionLabel: its number in the log, and whether the session learned."""

    request_id: int
    seq: int
    adapted: bool


class Weight(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What became of one weight; number 0 is the bias. `sure` is the deviation that is left."""

    weight: int
    before: float
    now: float
    sure: float


class SessionExplained(msgspec.Struct, array_like=True, frozen=True, tag=139, gc=False):
    """The answer to SessionExplain: counts, and the weights that moved, against the prior.

    `against` is the log of the likelihood ratio of the model to the session; negative: the session
    helps. `with_model`: it answers as the model does.
    """

    request_id: int
    labels: int
    refused: int
    falls: int
    against: float
    with_model: bool
    moved: list[Weight]


class SessionDone(msgspec.Struct, array_like=True, frozen=True, tag=140, gc=False):
    """The answer to SessionReset and SessionClose."""

    request_id: int


class Forgotten(msgspec.Struct, array_like=True, frozen=True, tag=141, gc=False):
    """The answer to ForgetSessions: how many there were."""

    request_id: int
    sessions: int


SessionRequest = (
    SessionPredict
    | SessionRank
    | SessionLabel
    | SessionExplain
    | SessionReset
    | SessionClose
    | ForgetSessions
)
SessionReply = (
    SessionPredicted | SessionRanked | SessionLabelled | SessionExplained | SessionDone | Forgotten
)
