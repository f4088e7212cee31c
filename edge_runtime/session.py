"""A session as an application sees it: the runtime's words, spoken by one person.

Why: who asks, ranks and labels for a visitor should not have to repeat whom it is about, and should
get the same words in process, on the socket and over HTTP.

A session opens with its first label, and ends when it is closed or was not used for long. A handle
is only a name: making one costs nothing, and it may be kept or made anew.

Threads: as those of the runtime.

Knows nothing about how a session learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from edge_runtime.device.adapting import Adapting
from edge_runtime.device.asking import Asking
from edge_runtime.device.ranking import Ranked, Ranking
from edge_runtime.device.words import Event, Labelled, SessionPrediction
from edge_runtime.inference.package import Matrix
from edge_runtime.personal.explanation import Explanation
from edge_runtime.wire.messages import Fields

__all__ = ["Explanation", "Labelled", "Ranked", "Session", "SessionPrediction"]


class Session:
    """The session of `key` with a family. Raises: RequestError `bad_session_key`."""

    __slots__ = ("_adapting", "_asking", "_ranking", "_visitor")

    def __init__(
        self, family: str, key: str, asking: Asking, adapting: Adapting, ranking: Ranking
    ) -> None:
        self._asking, self._adapting, self._ranking = asking, adapting, ranking
        self._visitor = adapting.visitor(family, key)

    @property
    def family(self) -> str:
        """With which family the session is."""
        return self._visitor.family

    @property
    def key(self) -> str:
        """Whom it is of."""
        return self._visitor.key

    def predict(self, event: Event) -> SessionPrediction:
        """As `Runtime.predict`, shifted by what the session has learned. The log keeps what the
        model answered by itself. Raises: as `Runtime.predict`.
        """
        visitor = self._visitor
        return cast("SessionPrediction", self._asking.predict(visitor.family, event, visitor))

    async def predict_async(
        self, event: Event, *, timeout_s: float | None = None
    ) -> SessionPrediction:
        """As `predict`, without stalling the event loop. Raises: as `Runtime.predict_async`."""
        answer = await self._asking.predict_async(self.family, event, timeout_s, self._visitor)
        return cast("SessionPrediction", answer)

    def rank(
        self,
        event: Event,
        candidates: Sequence[Fields],
        k: int,
        features: Matrix | None = None,
    ) -> list[Ranked]:
        """The `k` best of `candidates` for this session, best first; only they are logged.

        A candidate completes the fields of `event`. With `features`, float32 (candidates, F) in
        the order of the feature spec, the windows are not asked. Fewer than `k`: all of them.
        Raises: RequestError (no_candidates, too_many_candidates, wrong_shape, not_finite, and those
        of `predict`, for any candidate that is looked at: with `features` only those shown),
        PackageError `run_failed`; nothing was then logged.
        """
        return self._ranking.rank(self._visitor, event, candidates, k, features)

    async def rank_async(
        self,
        event: Event,
        candidates: Sequence[Fields],
        k: int,
        features: Matrix | None = None,
        *,
        timeout_s: float | None = None,
    ) -> list[Ranked]:
        """As `rank`, without stalling the event loop; what is asked is not to be changed meanwhile.

        `timeout_s` None: the configured deadline.
        Raises: as `rank`, and CapacityError (overloaded, deadline_exceeded), nothing logged.
        """
        return await self._ranking.rank_async(
            self._visitor, event, candidates, k, features, timeout_s=timeout_s
        )

    def label(
        self,
        prediction_id: str,
        value: float,
        *,
        time_s: float | None = None,
        final: bool = True,
    ) -> Labelled:
        """As `Runtime.label`; the session learns the first final label of what it was answered.

        It learns nothing from one whose answer is no longer remembered here.
        Raises: as `Runtime.label`, and RequestError `other_session`.
        """
        return self._adapting.label(
            (self.family, self.key), prediction_id, value, time_s, final=final
        )

    def explain(self) -> Explanation:
        """What the session has learned, and by how much it moves answers."""
        return self._adapting.explain(self._visitor.name)

    def reset(self) -> None:
        """Answer as the model does, and learn anew from now on."""
        self._adapting.reset(self._visitor.name)

    def close(self) -> None:
        """The session is over, and forgotten; its key may be used again."""
        self._adapting.end(self._visitor.name)
