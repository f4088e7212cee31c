"""Handing in a package by a person: it is sent, judged like any other, and followed.

Why: not every model is learned here; one that comes from elsewhere must pass the same gate and the
same canary, and whoever brings it must see why it did not.

Invariants: nothing is signed here but the order, by the operator's key; no release key is needed or
read. What the present campaign cannot do is refused by name, before anything is judged.

Knows nothing about the learner's home.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from cloud_learner.asking import Asker
from cloud_learner.judging import JudgeAnswer
from cloud_learner.orders import Order, Wish
from cloud_learner.packed import Parcel, decoded, encoded, send_package
from edge_runtime.bus.base import Bus, Message
from edge_runtime.errors import HeadwaterError, PackageError, RequestError
from edge_runtime.wire import codec, subjects

SUBMIT_S = 120.0

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
    last = ""
    try:
        while True:
            rollout = await heard.get()
            if reason := _decided(rollout, release):
                return reason
            if (text := _progress(rollout, release)) != last:
                last = text
                tell(text)
    finally:
        await subscription.close()


def check_campaign(wish: Wish, selector: Mapping[str, str]) -> None:
    """Refuse what the present campaign cannot do.

    Raises: RequestError (unsupported_stages, unsupported_target).
    """
    if wish.stages != (100,):
        asked = ",".join(map(str, wish.stages))
        raise RequestError(
            "unsupported_stages",
            f"stages {asked} %: this campaign knows a canary and then all; nothing was judged",
            "--stages 100: the canary that the family declares, then every device",
        )
    target = ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
    if wish.to not in {"", target}:
        raise RequestError(
            "unsupported_target",
            f"canaries of {wish.family} are the devices with {target or 'any attributes'}; "
            f"{wish.to!r} cannot be asked for",
            "change [rollout] selector of the family, or leave --to out",
        )


def _decided(rollout: dict[str, Any], release: str) -> str:
    return next((e["reason"] for e in rollout["decisions"] if e["release"] == release), "")


def _progress(rollout: dict[str, Any], release: str) -> str:
    if rollout["unpublished"]:
        return f"{release} waits to be published: {rollout['last_failure'] or 'under way'}"
    if (rollout["canary"] or {}).get("release") == release:
        return f"{release} is on the canary: {', '.join(e['text'] for e in rollout['gates'])}"
    if rollout["pending"] == release:
        return f"{release} waits until {rollout['canary']['release']} is decided"
    return f"{release} is neither on trial nor decided; a newer one may have taken its place"
