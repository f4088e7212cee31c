"""What devices tell of their sessions on one release, pooled into the prior that follows from it.

Why: where events do not say whose they are, only devices know how people differ. What they tell
moves the prior that their sessions began with.

Invariants: no device counts for more than `CAP` sessions, nor for more than the device in the
middle, whatever it tells and however often. What is no moments, or of another prior, changes
nothing. At most `bytes_max` are kept; the device heard longest ago goes first. The same words in
the same order give the same prior.

What was told of the releases before is in the prior already, which stands for so many sessions;
more than `KNOWN_MAX` of them do not count, so that what is old fades.

Knows nothing about reports and releases, and not whether a device is who it says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cloud_learner.train.carry import carried
from cloud_learner.train.dataset import Matrix
from cloud_learner.train.declaration import Personal
from cloud_learner.train.prior import STRENGTH, next_prior, room_of
from edge_runtime.errors import PackageError
from edge_runtime.personal.moments import Moments
from edge_runtime.personal.prior import Prior

CAP = 50.0
KNOWN_MAX = 200.0
BYTES_MAX = 64 << 20
_TOLD = "sessions_told"


@dataclass(frozen=True)
class Anchor:
    """Where the next prior begins: `prior`, which stands for `sessions` that devices told of.

    It is of the embedding that gives `embeddings`, (rows, width), of the family's reference.
    """

    prior: Prior
    sessions: float
    embeddings: Matrix

    def moved(self, embeddings: Matrix) -> Anchor | None:
        """The same where the reference has these embeddings; None if they are of another width."""
        if embeddings.shape != self.embeddings.shape:
            return None
        prior = carried(self.prior, self.embeddings, embeddings)
        return Anchor(replace(prior, norm_max=room_of(embeddings)), self.sessions, embeddings)

    def declared(self, personal: Personal) -> Prior:
        """Its prior, with what a family declares of sessions."""
        return replace(self.prior, region=personal.region, forgetting=personal.forgetting)


def facts_of(anchor: Anchor | None) -> dict[str, float]:
    """What the package's provenance says of it; `told_of` reads it."""
    return {_TOLD: anchor.sessions} if anchor is not None and anchor.sessions else {}


def told_of(provenance: Mapping[str, Any]) -> float:
    """For how many sessions that devices told of a package's prior stands."""
    said = provenance.get(_TOLD)
    return said if isinstance(said, int | float) else 0.0


class Pooled:
    """Moments by device, all of `prior`."""

    def __init__(self, prior: Prior, known: float = 0.0, *, bytes_max: int = BYTES_MAX) -> None:
        """`known` is for how many sessions that devices told of `prior` stands."""
        self.prior, self._known = prior, float(max(0, min(known, KNOWN_MAX)))
        self._bytes_max = bytes_max
        self._told: dict[str, Moments] = {}

    def take(self, device: str, data: bytes) -> None:
        """Add what a device tells to what it told before. Raises: RequestError `bad_moments`."""
        moments = Moments.decode(data, self.prior)
        before = self._told.pop(device, None)
        if before is not None:
            moments.merge(before)
        moments.fade()
        self._told[device] = moments
        while len(self._told) * moments.nbytes > self._bytes_max:
            del self._told[next(iter(self._told))]

    def next(self, left_out: Collection[str] = ()) -> tuple[Prior, float]:
        """The prior that follows, and for how many told sessions it stands, beside those that any
        prior has of its own (`prior.STRENGTH`). `left_out` are devices that do not count.
        """
        told = [self._told[name] for name in sorted(self._told.keys() - set(left_out))]
        if not told:
            return self.prior, self._known
        counts = sorted(each.sessions for each in told)
        cap = min(CAP, counts[(len(counts) - 1) // 2])
        try:
            prior = next_prior(self.prior, told, cap, STRENGTH + self._known)
        except PackageError:  # beyond the numbers that any prior may have
            return self.prior, self._known
        return prior, self._known + sum(min(each, cap) for each in counts)

    def statistics(self) -> dict[str, int]:
        """Devices that are heard, and the sessions that they tell of."""
        return {
            "moments_devices": len(self._told),
            "moments_sessions": int(sum(each.sessions for each in self._told.values())),
        }
