"""The messages of Headwater as typed structs, encoded as MessagePack arrays.

Why: one declaration serves the device, the learner, the schemas in proto/ and the golden vectors.

Invariants: fields are only appended, and then with defaults; a tag is never used twice; an unknown
tag or version is quarantined by the reader, never guessed at. Times are seconds since the epoch,
UTC, event time unless the name says otherwise.

Knows nothing about how bytes are stored or sent. Implements proto/asyncapi.yaml.
"""

from __future__ import annotations

from typing import Literal

import msgspec

WIRE_VERSION = 1

EventClass = Literal["event", "label"]
Value = str | int | float
Fields = dict[str, Value]


class Scored(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one resident arm answered to an event: its release and its output values."""

    release: str
    arm: str
    outputs: list[float]


class Shown(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The place of a candidate in a ranking: number `place`, from 1, of the `of` that competed.

    `chance` is the probability with which it stood there, given those above it.
    """

    place: int
    of: int
    chance: float


class PredictionRecord(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    """An event that asked for a prediction, with the answer and the feature values behind it.

    `features` is float32, little-endian, in the order of the feature spec whose hash is `spec`.
    `scored` holds the arms that answer requests, the one that answered this first; one on trial
    that had no usable answer is missing. The stable arm answers for such, so whoever would have
    asked a missing arm would have got the stable one's answer. `propensity` is the probability that
    the arm which answered would, given who had an answer: the stable arm's counts their shares too.
    `adapted` says that the application was told another answer, which a session had shifted: the
    outputs here are the models' own. `shown` stands where a candidate was ranked and shown.
    """

    family: str
    kind: str
    time_s: float
    fields: Fields
    spec: str
    features: bytes
    propensity: float
    scored: list[Scored]
    adapted: bool = False
    shown: Shown | None = None


class ObservationRecord(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    """An event that was observed and asked for no answer."""

    family: str
    kind: str
    time_s: float
    fields: Fields


class LabelRecord(msgspec.Struct, array_like=True, frozen=True, tag=3, gc=False):
    """What turned out to be true of the prediction (`epoch`, `seq`) of the same device."""

    family: str
    epoch: int
    seq: int
    value: float
    time_s: float
    final: bool = True


Record = PredictionRecord | ObservationRecord | LabelRecord


OMITTED: dict[int, str] = {1: "sampled_out", 2: "over_quota"}
"""What stands in an envelope in the place of a record that the device keeps to itself."""


LOSSES = ("dropped", "stalled", "damaged", "trimmed")
"""Why sequence numbers are lost on a device; what else a reader finds there it counts as other."""

NO_PRIOR = -1
"""The epoch before the first of a log."""


class Envelope(msgspec.Struct, array_like=True, frozen=True):
    """Consecutive records of one device, epoch and class, as they stand in the event log.

    Entry i of `records` has sequence number `base_seq + i`; it is a record, or a key of OMITTED.
    The `skipped` sequence numbers right before `base_seq` are lost on the device, for `reason`
    (`dropped`: the log was full; `stalled`: the disk took nothing; `damaged`; `trimmed`: the
    learner held them once); `records` may then be empty. `prior` is the epoch before this one in
    the same log, NO_PRIOR for its first, 0 where it is not said: two epochs after the same one are
    two logs under one name.
    """

    version: int
    device: str
    epoch: int
    event_class: EventClass
    base_seq: int
    records: list[msgspec.Raw]
    skipped: int = 0
    reason: str = ""
    prior: int = 0


class Mark(msgspec.Struct, array_like=True, frozen=True):
    """The highest sequence number of an epoch and class that the learner holds durably."""

    epoch: int
    event_class: EventClass
    seq: int


class Watermark(msgspec.Struct, array_like=True, frozen=True):
    """What the learner tells a device that it holds; the device trims only below it."""

    version: int
    device: str
    marks: list[Mark]


class ArmReport(msgspec.Struct, array_like=True, frozen=True):
    """A release that a device has in memory; `serving_since_s` is wall time. As arm `left`, one on
    trial that the device has left by itself, as long as it follows the plan that named it.

    `variant` names the package that the device chose, empty where the release has only one;
    `run_us` is what a row took when it was loaded, 0 where that is unknown. `answered` counts the
    requests whose answer was drawn for this arm, `failed` those of them for which it had none that
    could be used, so that the stable arm answered or nobody.
    """

    family: str
    arm: str
    release: str
    serving_since_s: float
    variant: str = ""
    run_us: float = 0.0
    answered: int = 0
    failed: int = 0


class ShadowReport(msgspec.Struct, array_like=True, frozen=True):
    """How a shadow compares with the stable release `against`, on the same `rows`.

    `agreed` counts rows with the same decision, `bad` those without a usable answer; `distance` is
    the largest absolute difference of a row's outputs, cut at 1, and 1 for a bad row. `dropped`
    counts rows that were not compared since there was no idle time. Sums of `run_us` are over the
    shadow's runs.
    """

    family: str
    release: str
    against: str
    rows: int
    dropped: int
    agreed: int
    bad: int
    distance_sum: float
    distance_square_sum: float
    run_us_sum: float


class ColumnSketch(msgspec.Struct, array_like=True, frozen=True):
    """How often the values of one feature column lay in each bucket, empty buckets left out.

    `steps` gives each bucket as its distance from the one before, the first from 0; they rise with
    the values. An index lies in the bucket of its number. A number x lies in bucket 0 where |x| is
    below 2^-10, else, with e = floor(log2 |x|), in bucket 4 (e + 10) + floor(4 (|x| / 2^e - 1)) + 1
    with the sign of x.
    """

    name: str
    steps: list[int]
    counts: list[int]


class FeatureSketch(msgspec.Struct, array_like=True, frozen=True):
    """What the models of a family were given lately: a histogram of each column of the spec `spec`.

    It covers `rows` predictions that were answered up to the event time `until_s`, a sample of
    those since the sketch before.
    """

    family: str
    spec: str
    rows: int
    until_s: float
    columns: list[ColumnSketch]


class SessionMoments(msgspec.Struct, array_like=True, frozen=True):
    """What sessions that are over say together of the next prior; sent only where the device's
    owner allows it, and only of so many that none stands for itself.

    `moments` are in the form of proto/package.md (moments), of the prior of `release`.
    """

    family: str
    release: str
    moments: bytes


class Report(msgspec.Struct, array_like=True, frozen=True):
    """What a device says about itself. Counters count since the start of the process `epoch`.

    `durable` is where each epoch and class ends on the device that the learner may not hold whole.
    `sketches` come about once a minute, each family's in one report only. `floor` holds the
    versions of root and timestamp that the device confirmed last: it never goes back in one life
    of its disk. `issued_s` is the signed time of issue of the newest metadata that it has seen.
    `number` rises with each report of a process: one that is not above the last was sent before.
    """

    version: int
    device: str
    epoch: int
    time_s: float
    attributes: dict[str, str]
    arms: list[ArmReport]
    plan_seq: int
    counters: dict[str, int]
    refused: dict[str, int]
    predict_us: list[int]
    log_bytes: int
    log_pending: int
    durable: list[Mark] = []
    sketches: list[FeatureSketch] = []
    floor: list[int] = []
    issued_s: float = 0.0
    number: int = 0
    shadows: list[ShadowReport] = []
    moments: list[SessionMoments] = []


class TimeQuestion(msgspec.Struct, array_like=True, frozen=True):
    """What time is it? `nonce` is 16 random bytes, so that no old answer fits."""

    version: int
    nonce: bytes


class TimeAnswer(msgspec.Struct, array_like=True, frozen=True):
    """The wall time `time_s` when the question with this nonce came, signed by the key `keyid`.

    `signature` is by a key of the role `time` over "headwater-time-1|", the nonce, "|" and the time
    in whole milliseconds as decimal digits.
    """

    version: int
    nonce: bytes
    time_s: float
    signature: bytes
    keyid: str


class LearnerStatus(msgspec.Struct, array_like=True, frozen=True):
    """What the learner says about itself after each commit and each cycle.

    `clock_s` is the event time up to which all that is mature has been ingested and learned;
    `detail` is JSON for people's eyes, with no promise of form.
    """

    version: int
    time_s: float
    clock_s: float
    events_archived: int
    counters: dict[str, int]
    freshness_s: list[float]
    stage: str
    gates: list[str]
    detail: str = ""
