"""What a person may tell a campaign, and what of it the campaign can do.

Why: evidence decides, and a person may hold it back, end it, or keep single devices out of it.

Invariants: each word names who said it and why. What cannot be done is refused by name, with
nothing changed. Doing it twice is doing it once.

Knows nothing about plans and evidence.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cloud_learner.rollout.contest import Terms
from cloud_learner.rollout.state import State
from edge_runtime.errors import RequestError
from edge_runtime.update.approval import Approval

Verb = Literal["pause", "resume", "abort", "approve", "hold", "pin", "free", "contest"]


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """`verb` said by `by` for `reason`; hold, pin and free are about `device`, a contest has
    its `terms`.

    An approval may bring the gate's own, for devices that take no large step without it.
    """

    verb: Verb
    by: str
    reason: str
    device: str = ""
    release: str = ""
    terms: Terms | None = None
    approval: Approval | None = None


def check(state: State, told: Control) -> None:
    """Raises: RequestError (no_release, nothing_on_trial, nothing_to_approve, unknown_release,
    not_held) where `told` has no meaning.
    """
    live = state.live
    if state.stable is None:
        raise RequestError("no_release", "the family has no release yet; nothing was changed")
    if told.verb == "abort" and live is None:
        raise RequestError("nothing_on_trial", "no release is on trial; nothing was changed")
    if told.verb == "approve" and (live is None or not live.waiting):
        on_trial = " and ".join(releases(state)[1:])
        where = f"{on_trial} has not passed its stage yet" if live else "no release is on trial"
        raise RequestError(
            "nothing_to_approve",
            f"{where}; nothing was changed",
            "cloud-learner rollout status shows the gates",
        )
    if told.verb == "pin" and told.release not in releases(state):
        raise RequestError(
            "unknown_release",
            f"no plan names {told.release!r} now; nothing was changed",
            f"a device is pinned to one of: {', '.join(releases(state))}",
        )
    if told.verb == "free" and told.device not in {*state.hold, *state.pins}:
        raise RequestError(
            "not_held", f"{told.device} is neither held nor pinned; nothing was changed"
        )


def apply(state: State, told: Control) -> None:
    """Bring what concerns single devices and the pause into the state."""
    device = told.device
    if told.verb in ("pause", "resume"):
        state.paused = told.verb == "pause"
    if told.verb in ("hold", "pin", "free"):
        state.hold = [each for each in state.hold if each != device]
        state.pins = {name: each for name, each in state.pins.items() if name != device}
    if told.verb == "hold":
        state.hold = sorted([*state.hold, device])
    elif told.verb == "pin":
        state.pins = dict(sorted({**state.pins, device: told.release}.items()))


def releases(state: State) -> list[str]:
    """What the plan of now names."""
    offers = state.match.offers if state.match else [state.stable, state.canary]
    return [each.release for each in offers if each]
