"""The policy: what a package says of sessions, as one text in its metadata.

Why: from which prior a head starts, and how a ranking explores, belongs to a release as its weights
do: tried, signed and rolled back with it.

Invariants: a policy that was read can be used; the same policy has the same text; what is no policy
is refused with `bad_policy` or `bad_prior`.

Knows nothing about packages, sessions or candidates. Implements proto/package.md (personal).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from edge_runtime.errors import PackageError
from edge_runtime.personal.prior import Prior

POLICY_VERSION: Final = 1
OPTIMISM_MAX = 10.0


class _Stored(msgspec.Struct, frozen=True):
    version: Literal[1]
    prior_b64: str
    explore: float
    optimism: float


_decoder = msgspec.json.Decoder(_Stored)


@dataclass(frozen=True, eq=False)
class Policy:
    """What sessions of one release start from, and how they explore.

    `explore` is the share of the places of a ranking that are filled at random, in [0, 1];
    `optimism` is how many standard deviations of a candidate's shift are added to it (LinUCB, Li et
    al. 2010).

    Raises: PackageError `bad_policy`.
    """

    prior: Prior
    explore: float = 0.0
    optimism: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.explore <= 1 and 0 <= self.optimism <= OPTIMISM_MAX):
            raise _bad(f"explore is {self.explore} and optimism {self.optimism}")

    def to_json(self) -> str:
        """The policy as text; `from_json` gives it back bit for bit."""
        prior = base64.b64encode(self.prior.encode()).decode()
        stored = _Stored(POLICY_VERSION, prior, self.explore, self.optimism)
        return msgspec.json.encode(stored).decode()

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The policy in `text`. Raises: PackageError (bad_policy, bad_prior)."""
        try:
            stored = _decoder.decode(text)
            prior = base64.b64decode(stored.prior_b64, validate=True)
        except (msgspec.MsgspecError, binascii.Error, ValueError) as error:
            raise _bad(str(error)) from None
        return cls(Prior.decode(prior), stored.explore, stored.optimism)


def _bad(why: str) -> PackageError:
    return PackageError(
        "bad_policy",
        f"what the package says of sessions cannot be used: {why}; it is not served",
        "build the package again with the learner of this version",
    )
