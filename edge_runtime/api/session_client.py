"""Sessions as clients of the socket have them: a handle with the words of `Runtime.session`.

Why: whoever asks for one person says once who it is.

Invariants: a handle holds a name and nothing else: the session lives on the device, opens by itself
and outlives connections. Each call is one request; its errors are those of the client.

Knows no bytes and no sockets, and loads no numpy before rows are sent. Implements the client's half
of proto/socket.md (Sessions).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

from edge_runtime.api.session_frames import (
    SessionClose,
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
)

Map = Mapping[str, Any]
R = TypeVar("R", bound=SessionReply)


class Ask(Protocol):
    """Sends a request and waits for its reply, of the type `wanted`."""

    def __call__(self, request: SessionRequest, wanted: type[R]) -> R:
        """The reply. Raises: HeadwaterError, as the client does."""


class AsyncSession:
    """One session, as an `AsyncClient` asks about it; requests return futures."""

    def __init__(
        self,
        ask: Callable[[SessionRequest], asyncio.Future[Any]],
        next_id: Callable[[], int],
        family: str,
        key: str,
    ) -> None:
        self._ask, self._next_id, self._name = ask, next_id, (family, key)

    def predict(self, kind: str, time_s: float, fields: Map) -> asyncio.Future[SessionPredicted]:
        """The answer to an event as the session has learned it: `.id`, `.outputs`, `.release`,
        `.arm`, and `.base`, the models' own; `.adapted` says whether they differ.
        """
        return self._ask(
            SessionPredict(self._next_id(), *self._name, kind, time_s, cast("Any", fields))
        )

    def rank(
        self,
        kind: str,
        time_s: float,
        fields: Map,
        candidates: Sequence[Map],
        k: int,
        *,
        features: Any = None,
    ) -> asyncio.Future[SessionRanked]:
        """Which `k` of `candidates` to show, in the order of `.places`; only these are logged.

        A candidate is what it adds to `fields`; `features`, an array of float32 (candidates,
        columns), stands in place of what the device would work out from them.
        """
        name = self._next_id(), *self._name
        return self._ask(_rank_request(name, (kind, time_s, fields), candidates, k, features))

    def label(
        self, prediction_id: str, value: float, time_s: float | None = None, *, final: bool = True
    ) -> asyncio.Future[SessionLabelled]:
        """Say what turned out to be true; `.seq` is the label's own number, and `.adapted` says
        whether the session learned from it.
        """
        return self._ask(
            SessionLabel(self._next_id(), *self._name, prediction_id, value, time_s, final)
        )

    def explain(self) -> asyncio.Future[SessionExplained]:
        """What the session has learned: counts, and in `.moved` the weights that moved most."""
        return self._ask(SessionExplain(self._next_id(), *self._name))

    def reset(self) -> asyncio.Future[SessionDone]:
        """Let the session answer as the model does, and learn anew from now on."""
        return self._ask(SessionReset(self._next_id(), *self._name))

    def close(self) -> asyncio.Future[SessionDone]:
        """The session is over: the device forgets it."""
        return self._ask(SessionClose(self._next_id(), *self._name))


class Session:
    """One session, as a blocking `Client` asks about it."""

    def __init__(self, ask: Ask, next_id: Callable[[], int], family: str, key: str) -> None:
        self._ask, self._next_id, self._name = ask, next_id, (family, key)

    def predict(self, kind: str, time_s: float, fields: Map) -> SessionPredicted:
        """As AsyncSession.predict."""
        asked = SessionPredict(self._next_id(), *self._name, kind, time_s, dict(fields))
        return self._ask(asked, SessionPredicted)

    def rank(
        self,
        kind: str,
        time_s: float,
        fields: Map,
        candidates: Sequence[Map],
        k: int,
        *,
        features: Any = None,
    ) -> SessionRanked:
        """As AsyncSession.rank."""
        name = self._next_id(), *self._name
        asked = _rank_request(name, (kind, time_s, fields), candidates, k, features)
        return self._ask(asked, SessionRanked)

    def label(
        self, prediction_id: str, value: float, time_s: float | None = None, *, final: bool = True
    ) -> SessionLabelled:
        """As AsyncSession.label."""
        asked = SessionLabel(self._next_id(), *self._name, prediction_id, value, time_s, final)
        return self._ask(asked, SessionLabelled)

    def explain(self) -> SessionExplained:
        """As AsyncSession.explain."""
        return self._ask(SessionExplain(self._next_id(), *self._name), SessionExplained)

    def reset(self) -> SessionDone:
        """As AsyncSession.reset."""
        return self._ask(SessionReset(self._next_id(), *self._name), SessionDone)

    def close(self) -> SessionDone:
        """As AsyncSession.close."""
        return self._ask(SessionClose(self._next_id(), *self._name), SessionDone)


def _rank_request(
    name: tuple[int, str, str],
    event: tuple[str, float, Map],
    candidates: Sequence[Map],
    k: int,
    features: Any,
) -> SessionRank:
    """The request of `rank`."""
    said: Any = [dict(each) for each in candidates]
    kind, time_s, fields = event
    return SessionRank(*name, kind, time_s, dict(fields), said, k, _row_bytes(features))


def _row_bytes(features: Any) -> bytes | None:
    if features is None:
        return None
    import numpy as np

    return np.asarray(features, "<f4").tobytes()
