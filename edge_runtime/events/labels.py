"""Labels: what a caller may say of a prediction, and which predictions there were.

Why: a label comes hours after its prediction, maybe after a restart that took the prediction; it
must join the right one, or be refused by name.

Invariants: a record that was made here names a number that this device gave to an event and did not
lose; whether that event asked for a prediction of the same family is the learner's to see.
Ids read `device.epoch.seq`.

Knows nothing about what was predicted.
"""

from __future__ import annotations

import math

from edge_runtime.errors import RequestError
from edge_runtime.events.log import EventLog
from edge_runtime.wire.messages import LabelRecord


def label_record(
    log: EventLog,
    family: str,
    prediction_id: str,
    value: float,
    time_s: float,
    *,
    final: bool,
    outputs: int = 0,
) -> LabelRecord:
    """The record of a label for a prediction in `log`.

    An answer of several `outputs` has one for each class that the family may ever know, so those
    are the labels, also of classes that this release has not seen.

    Raises: RequestError (unknown_prediction, prediction_lost, wrong_type, not_finite, bad_label).
    """
    epoch, seq = position(log, prediction_id)
    value, time_s = _number(value, "value"), _number(time_s, "time_s")
    if outputs > 1 and not (0 <= value < outputs and value.is_integer()):
        raise RequestError(
            "bad_label",
            f"value: {value:g} is not one of the classes 0 to {outputs - 1} of {family}",
            "a label is the number of a class; how many there may be is decided with the family",
        )
    return LabelRecord(family, epoch, seq, value, time_s, bool(final))


def position(log: EventLog, prediction_id: str) -> tuple[int, int]:
    """(epoch, seq) of a prediction in `log`.

    Raises: RequestError (unknown_prediction, prediction_lost).
    """
    device, epoch, seq = _parse(prediction_id)
    if device != log.device:
        raise _unknown(prediction_id, f"this device is {log.device!r}")
    if epoch == log.epoch:
        if seq > log.handed_out("event"):
            raise _unknown(prediction_id, "it was never handed out")
        return epoch, seq
    end = dict(log.ends("event")).get(epoch)
    if end is None:
        raise _unknown(prediction_id, f"nothing is known of epoch {epoch}")
    if seq > end or log.reason("event", epoch, seq) == "stalled":
        raise RequestError(
            "prediction_lost",
            f"prediction {prediction_id} was lost before it was durable; no label can join it",
            "drop the label",
        )
    return epoch, seq


def _parse(prediction_id: str) -> tuple[str, int, int]:
    device, _, rest = str(prediction_id).partition(".")
    epoch, _, seq = rest.partition(".")
    if not (_is_count(epoch) and _is_count(seq)):
        raise _unknown(prediction_id, "an id reads device.epoch.seq")
    return device, int(epoch), int(seq)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20 and text[0] != "0"


def _unknown(prediction_id: str, why: str) -> RequestError:
    return RequestError(
        "unknown_prediction", f"prediction {prediction_id!r:.200} is unknown: {why}"
    )


def _number(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError("wrong_type", f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise RequestError("not_finite", f"{name}: {value} is not a finite number")
    return float(value)
