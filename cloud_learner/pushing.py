"""Handing in a package by a person: it is sent, judged like any other, and followed.

Why: not every model is learned here; one that comes from elsewhere must pass the same gate and the
same canary, and whoever brings it must see why it did not.

Invariants: nothing is signed here but the order, by the operator's key; no release key is needed or
read.

Knows nothing about the learner's home.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from cloud_learner.asking import Asker
from cloud_learner.judging import JudgeAnswer
from cloud_learner.orders import Order, Wish
from cloud_learner.packed import Parcel, decoded, encoded, send_package
from edge_runtime.bus.base import Bus, Message
from edge_runtime.errors import HeadwaterError, PackageError
from edge_runtime.wire import codec, subjects

SUBMIT_S = 120.0
MISSED_MAX = 2

Tell = Callable[[str], None]


class Submission(msgspec.Struct, array_like=True, frozen=True):
    """What is handed in: the order, and where its packages lie."""

    order: Order
    package: Parcel
    float_package: Parcel


class Pushed(msgspec.Struct, array_like=True, frozen=True):
    """What came of it: the verdicts, and the release's name where one was offered."""

    answer: JudgeAnswer
    release: str


class RefusedError(PackageError):
    """The gate did not pass what was handed in."""


async def hand_in(bus: Bus, order: Order, package: bytes, float_package: bytes) -> Pushed:
    """Send a package and its order. Raises: RequestError, TransportError."""
    family = msgspec.json.decode(order.text, type=Wish).family
    asker = Asker(bus)
    try:
        submission = Submission(
            order, await send_package(bus, package), await send_package(bus, float_package)
        )
        data = await asker.ask(subjects.submit(family), encoded(submission), wait_s=SUBMIT_S)
    finally:
        await asker.close()
    return decoded(data, Pushed)


async def follow(bus: Bus, family: str, release: str, tell: Tell) -> str:
    """How the campaign of a release ended: the reason of its decision."""
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue(16)

    async def hear(message: Message) -> None:
        # A word that is none of this family's, or one too many, is no news: another follows.
        with suppress(HeadwaterError, KeyError, ValueError, asyncio.QueueFull):
            detail = json.loads(codec.decode_status(message.data).detail)
            heard.put_nowait(detail["families"][family]["rollout"])

    subscription = await bus.subscribe(subjects.LEARNER_STATUS, hear)
    last, missed = "", 0
    try:
        while True:
            rollout = await heard.get()
            if reason := _decided(rollout, release):
                return reason
            missed = 0 if _is_known(rollout, release) else missed + 1
            if missed > MISSED_MAX:  # one word may be older than the offer
                return "superseded"
            if (text := _progress(rollout, release)) != last:
                last = text
                tell(text)
    finally:
        await subscription.close()


def _decided(rollout: dict[str, Any], release: str) -> str:
    return next((e["reason"] for e in rollout["decisions"] if e["release"] == release), "")


def _is_known(rollout: dict[str, Any], release: str) -> bool:
    """Whether a release is on trial or waits; one that is neither was replaced by a newer one."""
    return release in {rollout["pending"], (rollout["canary"] or {}).get("release")}


def _progress(rollout: dict[str, Any], release: str) -> str:
    if rollout["unpublished"]:
        return f"{release} waits to be published: {rollout['last_failure'] or 'under way'}"
    if (rollout["canary"] or {}).get("release") == release:
        return (
            f"{release} is on {_where(rollout)}: {', '.join(e['text'] for e in rollout['gates'])}"
        )
    if rollout["pending"] == release and rollout["canary"]:
        return f"{release} waits until {rollout['canary']['release']} is decided"
    held = "the campaign is paused" if rollout["paused"] else "a contest is under way"
    return f"{release} waits" + (f": {held}" if rollout["paused"] or rollout["contest"] else "")


def _where(rollout: dict[str, Any]) -> str:
    """The stage of now among all, and how many of its devices have shown it."""
    now = next(each for each in rollout["stages"] if each["state"] == "now")
    if len(rollout["stages"]) == 1:
        return "the canary"
    silent = f", {now['silent']} of them silent" if now["silent"] else ""
    waits = f", and waits for somebody to {rollout['waits']} it" if rollout["waits"] else ""
    return f"the canary, {now['stage']} of {now['devices']} devices{silent}{waits}"
