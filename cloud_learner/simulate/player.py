"""The player: plays a stream of rows to devices, as the application beside each would live it.

Why: what the loop is worth shows only on real events in their real order, each label coming when
it really came.

How: each device has a lane, and lanes run at once. A lane goes strictly by event time: labels that
are due, then the row. A prediction is awaited before anything later is sent; observations and
labels are pipelined before it. No lane passes the horizon, an event time that the caller moves; so
the replay can wait for the learner. After a lane's last row its remaining labels follow without
waiting, since nothing is left that the wait could protect.

Invariants: nothing is sent twice unless a crash took it. Rows held for slow lanes are bounded.

Knows nothing about models, brokers and learning.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from itertools import count, islice
from math import inf
from pathlib import Path
from typing import Any

from cloud_learner.experiment.replay import DataRow
from cloud_learner.simulate.books import Label, Question
from cloud_learner.simulate.exchange import Exchange
from edge_runtime.errors import ConfigError
from edge_runtime.inference.package import Interface
from edge_runtime.metrics import Histogram

DEAL_ROWS = 256
HELD_ROWS_MAX = 1 << 16

Action = Callable[[], Coroutine[Any, Any, None]]


class Player:
    """Plays `rows`, in time order, to `sockets`, a socket per device.

    `horizon` says up to which event time to play; call `advance` when it may have moved.
    """

    def __init__(
        self,
        rows: Iterable[DataRow],
        sockets: Mapping[str, Path],
        interface: Interface,
        *,
        horizon: Callable[[], float] = lambda: inf,
        patience_s: float = 60.0,
    ) -> None:
        self.horizon = horizon
        self.interface = interface
        self.predicting = frozenset(k for k, kind in interface.kinds.items() if kind.predicts)
        self.dealer = _Dealer(rows, sockets)
        self._lanes = {
            device: _Lane(self, Exchange(device, path, interface.family, patience_s=patience_s))
            for device, path in sockets.items()
        }
        self.moved = asyncio.Event()
        # One question at a time: a year in minutes shall not queue the devices of one machine
        # behind each other, which in the field have a processor each.
        self.turn = asyncio.Lock()
        self.group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Play to the end, until every answer is durable on its device.

        Raises: as Exchange.send, and ConfigError `unknown_device`; or what an action raised.
        """
        try:
            async with asyncio.TaskGroup() as self.group:
                for device, lane in self._lanes.items():
                    self.group.create_task(lane.run(), name=f"lane {device}")
        finally:
            for lane in self._lanes.values():
                await lane.exchange.close()

    def advance(self) -> None:
        """The horizon may have moved: lanes that wait look again."""
        self.moved.set()
        self.moved = asyncio.Event()

    def at(self, time_s: float, action: Action, *, device: str | None = None) -> None:
        """Start `action` when `device` reaches event time `time_s`; None: when the first does.

        The lanes go on meanwhile; the run ends only after it, and fails if it does.
        """
        chosen = self._lanes.values() if device is None else [self._lanes[device]]
        once = _Once(action)
        for lane in chosen:
            lane.add_hook(time_s, once)

    @property
    def latency(self) -> Histogram:
        """Microseconds from asking to answer, as the application saw it, over all devices."""
        whole = Histogram()
        for lane in self._lanes.values():
            whole.merge(lane.exchange.latency)
        return whole

    def event_times(self) -> dict[str, float]:
        """The event time that each device was played to."""
        return {device: lane.time_s for device, lane in self._lanes.items()}

    def statistics(self) -> dict[str, Any]:
        """Counts over all devices; `lost_in_linger` and `refused` are tables of their own."""
        answered, lost, refused, counts = (Counter[str]() for _ in range(4))
        for lane in self._lanes.values():
            books = lane.exchange.books
            answered.update(books.answered)
            lost.update(books.lost)
            refused.update(books.refused)
            counts.update(books.counts)
            counts.update(reconnects=lane.exchange.reconnects)
            counts.update(horizon_waits=lane.waits, horizon_wait_ms=round(lane.waited_s * 1000))
        kinds = ("predictions", "observations", "labels")
        latency = self.latency
        return {
            **{kind: answered[kind] for kind in kinds},
            "events_answered": answered.total(),
            "events_lost_in_linger": lost.total(),
            "lost_in_linger": {kind: lost[kind] for kind in kinds},
            "refused": dict(refused),
            **counts,
            "predict_p50_us": latency.quantile(0.5),
            "predict_p99_us": latency.quantile(0.99),
        }


class _Once:
    """An action that several lanes may reach, and the first one starts."""

    def __init__(self, action: Action) -> None:
        self._action: Action | None = action

    def start(self, group: asyncio.TaskGroup) -> None:
        action, self._action = self._action, None
        if action is not None:
            group.create_task(action(), name="player action")


class _Lane:
    """One device's part: its rows, the labels that are not yet due, its hooks."""

    def __init__(self, player: Player, exchange: Exchange) -> None:
        self.exchange = exchange
        self.time_s = -inf
        self.waits, self.waited_s = 0, 0.0
        self._player = player
        self._due: list[tuple[float, int, Question]] = []
        self._hooks: list[tuple[float, int, _Once]] = []
        self._order = count()
        self._pause_s = -inf  # beyond it, horizon and hooks want to be looked at

    def add_hook(self, time_s: float, once: _Once) -> None:
        heapq.heappush(self._hooks, (time_s, next(self._order), once))
        self._pause_s = -inf

    async def run(self) -> None:
        exchange = self.exchange
        await exchange.open()
        while batch := await self._player.dealer.take(exchange.device):
            for row in batch:
                await self._play(row)
        while self._due:
            await self._send_label()
        await exchange.settle_durable()

    async def _play(self, row: DataRow) -> None:
        time_s, due, send = row.time_s, self._due, self.exchange.send
        while due and due[0][0] <= time_s:
            if due[0][0] > self._pause_s:
                await self._pause(due[0][0])
            await self._send_label()
        if time_s > self._pause_s:
            await self._pause(time_s)
        self.time_s = time_s
        if row.kind not in self._player.predicting:
            await send(row)
            return
        question = Question(row)
        if row.label is not None and row.label_time_s is not None:
            heapq.heappush(due, (row.label_time_s, next(self._order), question))
        async with self._player.turn:
            await send(question)

    async def _send_label(self) -> None:
        _, _, question = heapq.heappop(self._due)
        await self.exchange.send(Label(question))

    async def _pause(self, time_s: float) -> None:
        """Wait until `time_s` is within the horizon, then start the actions that it reaches."""
        horizon_s = self._player.horizon()
        if time_s > horizon_s:
            started_s = time.monotonic()
            horizon_s = await self._wait_for(time_s)
            self.waited_s += time.monotonic() - started_s
        group = self._player.group
        assert group is not None
        while self._hooks and self._hooks[0][0] <= time_s:
            heapq.heappop(self._hooks)[2].start(group)
        # A hook at a time wants the first item at that time or later, so stop just before it.
        hook_s = self._hooks[0][0] if self._hooks else inf
        self._pause_s = min(horizon_s, math.nextafter(hook_s, -inf))

    async def _wait_for(self, time_s: float) -> float:
        """The horizon, once `time_s` is within it. A crash meanwhile is mended meanwhile: the
        learner may be waiting for just what it took.
        """
        await self.exchange.settle()
        self.waits += 1
        lost = asyncio.ensure_future(self.exchange.wait_lost())
        try:
            while time_s > (horizon_s := self._player.horizon()):
                moved = asyncio.ensure_future(self._player.moved.wait())
                await asyncio.wait([lost, moved], return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
                if lost.done():
                    await self.exchange.recover()
                    lost = asyncio.ensure_future(self.exchange.wait_lost())
            return horizon_s
        finally:
            lost.cancel()


class _Dealer:
    """Deals rows to the lanes, reading on when a lane has none left."""

    def __init__(self, rows: Iterable[DataRow], devices: Iterable[str]) -> None:
        self._rows = iter(rows)
        self._hands: dict[str, list[DataRow]] = {device: [] for device in devices}
        self._taken = asyncio.Event()

    async def take(self, device: str) -> list[DataRow]:
        """The next rows of `device`; empty at the end. Waits while others hold too many."""
        hands = self._hands
        while not hands[device]:
            if sum(map(len, hands.values())) > HELD_ROWS_MAX:
                self._taken.clear()
                await self._taken.wait()
            elif not self._deal():
                break
        hand, hands[device] = hands[device], []
        self._taken.set()
        return hand

    def _deal(self) -> bool:
        rows = list(islice(self._rows, DEAL_ROWS))
        for row in rows:
            hand = self._hands.get(row.device)
            if hand is None:
                raise ConfigError(
                    "unknown_device",
                    f"the data has a device {row.device!r}; known: {', '.join(self._hands)}",
                )
            hand.append(row)
        return bool(rows)
