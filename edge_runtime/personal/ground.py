"""The ground: what sessions stand on, and how one comes to stand on another.

Why: in the embedding of a new release a session has to learn its own history anew. That runs the
model, which may take long; so a `Move` begins and arrives where sessions are used, and learns
anywhere.

Invariants: a move has heads and history of its own; it arrives only where the session that it began
with was told nothing meanwhile.

Knows nothing about which sessions are open, nor about events and files.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.errors import PackageError, RequestError
from edge_runtime.personal.head import Embed, Head
from edge_runtime.personal.prior import Matrix, Prior, Vector

KEY_LENGTH_MAX = 256

Key = tuple[str, str]
"""Family, and whom the session is of."""


def _no_rows(rows: Matrix) -> tuple[Matrix, Vector]:
    raise AssertionError(f"{len(rows)} rows were kept where none can be embedded")


@dataclass(frozen=True, eq=False)
class Ground:
    """What the sessions of a family stand on: a `release`, its prior, and its features.

    `spec` names the features, `columns` is how many there are (0: no history is kept), and `embed`
    is the release's model. One that is not `quick` is not to be run while others wait.
    """

    prior: Prior
    spec: str = ""
    columns: int = 0
    embed: Embed = _no_rows
    release: str = ""
    quick: bool = True


class Move:
    """A session on its way from `left` to another ground; `head` is what it is there, None where
    the model fails on what it was told. All heads of `prior` are the mover's until they arrive.
    """

    def __init__(self, left: Head, prior: Prior) -> None:
        self.head: Head | None = left.carried(prior)
        self._left, self._counts = left, left.counts

    def learn(self, embed: Embed) -> None:
        """Learn the session's own history by the new model."""
        assert self.head is not None
        try:
            self.head.catch_up(embed)
        except PackageError:
            self.head = None

    def holds(self, head: Head) -> bool:
        """Whether `head` is still what the move began with."""
        return head is self._left and head.counts == self._counts


def checked_key(key: str) -> str:
    """`key`, if it can be one of a session. Raises: RequestError `bad_session_key`."""
    fits = isinstance(key, str) and 0 < len(key) <= KEY_LENGTH_MAX
    if not fits or key.encode(errors="replace").decode() != key:  # half a surrogate pair
        raise RequestError(
            "bad_session_key",
            f"a session's key is no text of 1 to {KEY_LENGTH_MAX} characters; none was opened",
            "use such as a hash of what you have, in hexadecimal digits",
        )
    return key
