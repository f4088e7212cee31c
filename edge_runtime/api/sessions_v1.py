"""What /edge/v1/session and /edge/v1/sessions answer: sessions by HTTP, as JSON.

Why: whatever can speak HTTP has the words that `Runtime.session` has in process.

Invariants: a session's key travels in the body, never in a path, for paths end in logs. A body is
small, and read whole or refused; a field that is unknown is refused. What would keep the loop's
thread for too long is awaited.

Knows nothing about HTTP. See proto/openapi.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from edge_runtime.api.edge_v1 import read
from edge_runtime.errors import RequestError
from edge_runtime.inference.tensors import Array
from edge_runtime.runtime import Event, Runtime
from edge_runtime.session import Explanation, Labelled, Ranked, Session

_FP32_MAX = float(np.finfo(np.float32).max)
_Cell = Annotated[float, msgspec.Meta(ge=-_FP32_MAX, le=_FP32_MAX)]


Ask = Callable[[Runtime, str, bytes], Any]
"""Takes runtime, family and body; gives the answer, or what to await for it."""


class SessionBody(msgspec.Struct, forbid_unknown_fields=True):
    """Whose session: `key` has 1 to 256 characters."""

    key: str


class SessionEventBody(SessionBody):
    """An event, to be answered within a session."""

    kind: str
    time_s: float
    fields: dict[str, Any]


class RankBody(SessionEventBody):
    """Candidates, each with what it adds to the event's fields; the best `k` are wanted."""

    candidates: list[dict[str, Any]]
    k: int
    features: list[list[_Cell]] | None = None


class SessionLabelBody(SessionBody):
    """A label, for log and session; without `time_s`, now."""

    prediction_id: str
    value: float
    time_s: float | None = None
    final: bool = True


class ForgetBody(msgspec.Struct, forbid_unknown_fields=True):
    """Whose sessions to forget; without `family`, all."""

    family: str | None = None


_session_in: Callable[[bytes], SessionBody] = msgspec.json.Decoder(SessionBody).decode
_event_in: Callable[[bytes], SessionEventBody] = msgspec.json.Decoder(SessionEventBody).decode
_ranking_in: Callable[[bytes], RankBody] = msgspec.json.Decoder(RankBody).decode
_label_in: Callable[[bytes], SessionLabelBody] = msgspec.json.Decoder(SessionLabelBody).decode
_forget_in: Callable[[bytes], ForgetBody] = msgspec.json.Decoder(ForgetBody).decode


def predict(runtime: Runtime, family: str, body: bytes) -> Any:
    """The answer to an event, or what to await for it."""
    asked = read(_event_in, body)
    session = runtime.session(family, asked.key)
    if runtime.model(family).inline:
        return session.predict(_event(asked))
    return session.predict_async(_event(asked))


def rank(runtime: Runtime, family: str, body: bytes) -> Any:
    """What to show, in its order, or what to await for it."""
    asked = read(_ranking_in, body)
    session = runtime.session(family, asked.key)
    if len(asked.candidates) > runtime.model(family).quick_rows:
        return _rank_elsewhere(session, asked)
    return _places(session.rank(_event(asked), asked.candidates, asked.k, _rows(asked)))


def label(runtime: Runtime, family: str, body: bytes) -> Labelled:
    """The label's number, and whether the session learned from it."""
    said = read(_label_in, body)
    session = runtime.session(family, said.key)
    return session.label(said.prediction_id, said.value, time_s=said.time_s, final=said.final)


def explain(runtime: Runtime, family: str, body: bytes) -> Explanation:
    """What a session has learned."""
    return _session(runtime, family, body).explain()


def reset(runtime: Runtime, family: str, body: bytes) -> dict[str, Any]:
    """Nothing: the session learns anew."""
    _session(runtime, family, body).reset()
    return {}


def close(runtime: Runtime, family: str, body: bytes) -> dict[str, Any]:
    """Nothing: the session is over."""
    _session(runtime, family, body).close()
    return {}


def forget(runtime: Runtime, _family: str, body: bytes) -> dict[str, int]:
    """How many sessions were forgotten."""
    return {"sessions": runtime.forget_sessions(read(_forget_in, body).family)}


WORDS: dict[str, Ask] = {
    each.__name__: each for each in (predict, rank, label, explain, reset, close)
}
"""What is asked of one session, by the last word of its path."""


def _session(runtime: Runtime, family: str, body: bytes) -> Session:
    return runtime.session(family, read(_session_in, body).key)


async def _rank_elsewhere(session: Session, asked: RankBody) -> dict[str, Any]:
    rows = _rows(asked)
    return _places(await session.rank_async(_event(asked), asked.candidates, asked.k, rows))


def _places(ranked: Sequence[Ranked]) -> dict[str, Any]:
    return {"places": ranked}


def _event(asked: SessionEventBody) -> Event:
    return Event(asked.kind, asked.time_s, asked.fields)


def _rows(asked: RankBody) -> Array | None:
    """The rows of the candidates. Raises: RequestError `wrong_shape`."""
    if asked.features is None:
        return None
    if len({len(row) for row in asked.features}) > 1:
        raise RequestError(
            "wrong_shape", "the rows of features differ in length; nothing was ranked"
        )
    return np.array(asked.features, np.float32)
