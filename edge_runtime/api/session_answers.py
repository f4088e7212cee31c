"""What requests about sessions are answered with: the answers of `Runtime.session`, as replies.

Why: the words of the socket are those of a session in process, no more and no less.

Invariants: each request names its session, which opens by itself; nothing is kept between two. What
would keep the loop's thread for too long is answered by `later`, anything else by `now`.

Knows nothing about sockets. Implements proto/socket.md (Sessions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.api.session_frames import (
    ForgetSessions,
    Forgotten,
    Place,
    SessionDone,
    SessionExplain,
    SessionExplained,
    SessionLabel,
    SessionLabelled,
    SessionPredict,
    SessionPredicted,
    SessionRank,
    SessionRanked,
    SessionReply,
    SessionRequest,
    SessionReset,
    Weight,
)
from edge_runtime.errors import RequestError
from edge_runtime.inference.tensors import Array
from edge_runtime.runtime import Event, Runtime
from edge_runtime.session import Explanation, Ranked, Session, SessionPrediction


def now(runtime: Runtime, asked: SessionRequest) -> SessionReply:
    """The reply to a request; nothing is awaited. Raises: HeadwaterError, as the session does."""
    if isinstance(asked, ForgetSessions):
        return Forgotten(asked.request_id, runtime.forget_sessions(asked.family or None))
    session = runtime.session(asked.family, asked.key)
    if isinstance(asked, SessionPredict):
        return _predicted(asked.request_id, session.predict(_event(asked)))
    if isinstance(asked, SessionRank):
        answer = session.rank(_event(asked), *_candidates(asked))
        return _ranked(asked.request_id, answer)
    if isinstance(asked, SessionLabel):
        return _label(session, asked)
    if isinstance(asked, SessionExplain):
        return _explained(asked.request_id, session.explain())
    if isinstance(asked, SessionReset):
        session.reset()
    else:
        session.close()
    return SessionDone(asked.request_id)


async def later(runtime: Runtime, asked: SessionPredict | SessionRank) -> SessionReply:
    """The reply to what a heavy model must answer, or a model many times."""
    session, event = runtime.session(asked.family, asked.key), _event(asked)
    if isinstance(asked, SessionPredict):
        return _predicted(asked.request_id, await session.predict_async(event))
    return _ranked(asked.request_id, await session.rank_async(event, *_candidates(asked)))


def _event(asked: SessionPredict | SessionRank) -> Event:
    fields: Any = asked.fields  # a family's interface refuses bool and None by the field's name
    return Event(asked.kind, asked.time_s, fields)


def _candidates(asked: SessionRank) -> tuple[Any, int, Array | None]:
    """What a session ranks, how many of it, and its rows. Raises: RequestError `wrong_shape`."""
    if asked.features is None:
        return asked.candidates, asked.k, None
    count, size = len(asked.candidates), len(asked.features)
    if not count or size % (4 * count):
        raise RequestError(
            "wrong_shape",
            f"features has {size} bytes, which are no {count} rows of float32; nothing was ranked",
            "send one row for each candidate, or none at all",
        )
    return asked.candidates, asked.k, np.frombuffer(asked.features, "<f4").reshape(count, -1)


def _predicted(request_id: int, answer: SessionPrediction) -> SessionPredicted:
    return SessionPredicted(
        request_id,
        answer.id,
        answer.outputs,
        answer.release,
        answer.arm,
        answer.base,
        answer.adapted,
    )


def _ranked(request_id: int, answer: Sequence[Ranked]) -> SessionRanked:
    places = [
        Place(each.id, each.index, each.score, each.base, each.chance, each.release, each.arm)
        for each in answer
    ]
    return SessionRanked(request_id, places)


def _label(session: Session, asked: SessionLabel) -> SessionLabelled:
    answer = session.label(asked.prediction_id, asked.value, time_s=asked.time_s, final=asked.final)
    return SessionLabelled(asked.request_id, answer.seq, answer.adapted)


def _explained(request_id: int, answer: Explanation) -> SessionExplained:
    return SessionExplained(
        request_id,
        answer.labels,
        answer.refused,
        answer.falls,
        answer.against,
        answer.with_model,
        [Weight(each.weight, each.before, each.now, each.sure) for each in answer.moved],
    )
