"""The live part of the demo: a broker, the learner, three devices, an application, and attackers.

Why: everything here is a real process speaking over real sockets and a real broker; this file only
starts them, plays the stream, injects the faults at their event times, and watches.

Invariants: what is counted comes from the application's own count, the devices' reports and the
learner's status; nothing of it steers the loop but the horizon, which lets event time wait for the
learner. Leaving ends every process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cloud_learner.admission import Admissions
from cloud_learner.broker import Broker
from cloud_learner.children import spawn_tied
from cloud_learner.config import Home
from cloud_learner.console.state import DeviceRow, FaultRow, LearnerRow, ViewState
from cloud_learner.console.view import LiveView
from cloud_learner.experiment.replay import DataRow
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.simulate import faults
from cloud_learner.simulate.fleet import DeviceProcess, Fleet
from cloud_learner.simulate.player import Player
from cloud_learner.simulate.watch import Watch, quantiles
from edge_runtime.bus import nats
from edge_runtime.bus.base import Bus
from edge_runtime.errors import TransportError
from edge_runtime.inference.package import Interface
from edge_runtime.metrics import Histogram
from edge_runtime.wire.messages import Report

LAG_S = 24 * 3600.0
READY_S = 60.0
SETTLE_S = 60.0
ATTACK_S = 180.0
VIEW_S = 0.5
LINGER_MS = 10


class Live:
    """One live run below `var`; `run` plays `rows` and leaves its findings in the attributes."""

    def __init__(self, var: Path, home: Home, interface: Interface) -> None:
        self._var, self._home, self._interface = var, home, interface
        self.family = interface.family
        self.watch = Watch()
        self.faults: dict[str, FaultRow] = {}
        self.elapsed_s = 0.0
        self._started_s = 0.0
        self._killed: set[str] = set()

    async def run(self, rows: list[DataRow], devices: list[str], times: dict[str, float]) -> None:
        """Play everything. `times` are the event times of the faults. Raises: HeadwaterError."""
        async with self._processes(devices) as (url, bus, fleet):
            watch, family = self.watch, self.family
            await watch.wait(
                "the first release on every device",
                lambda: (
                    len(watch.reports) == len(devices)
                    and all(report.arms for report in watch.reports.values())
                ),
                READY_S,
            )
            # What the bootstrap has learned is not learned again: nothing to wait for before it.
            known_s = self._home.of(family).origin().learned_through_s
            self.player = Player(
                rows,
                fleet.sockets,
                self._interface,
                horizon=lambda: (
                    max(known_s, watch.status.clock_s if watch.status else known_s) + LAG_S
                ),
            )
            watch.on_status.append(self.player.advance)
            self._plan_faults(bus, times, family)
            self._started_s = time.monotonic()
            async with asyncio.TaskGroup() as group:
                aside = [group.create_task(fleet.supervise()), group.create_task(self._show(url))]
                await self.player.run()
                await self._settle()
                self.elapsed_s = time.monotonic() - self._started_s
                for task in aside:
                    task.cancel()
            await self._last_words()

    @contextlib.asynccontextmanager
    async def _processes(self, devices: list[str]) -> AsyncIterator[tuple[str, Bus, Fleet]]:
        with contextlib.ExitStack() as stack:
            admissions = Admissions(self._home)
            broker = stack.enter_context(Broker.start(self._home.broker, admissions.rules()))
            processes = [self._device(name, broker.url) for name in devices]
            for process in processes:
                admissions.admit(process.name, process.public_key(), replace=True)
            stack.enter_context(self._learner(broker.url))
            bus = await nats.connect(broker.url, name="demo", access=admissions.access())
            try:
                await self.watch.follow(bus)
                async with Fleet(processes) as fleet:
                    self._processes_of = {process.name: process for process in processes}
                    yield broker.url, bus, fleet
            finally:
                await bus.close()

    def _device(self, name: str, url: str) -> DeviceProcess:
        options: Any = {"attributes": {"airport": name}, "nats": url, "linger_ms": LINGER_MS}
        options |= {"families": [self.family], "root": self._home.trusted_root}
        return DeviceProcess(name, self._var / "devices" / name, **options)

    @contextlib.contextmanager
    def _learner(self, url: str) -> Any:
        command = [sys.executable, "-m", "cloud_learner.simulate.faults"]
        with open(self._var / "learner.log", "wb") as log:
            process = spawn_tied([*command, str(self._home.root), url], output=log.fileno())
            self.watch.check_alive = lambda: self._check_learner(process)
            try:
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _check_learner(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is not None:
            log = self._var / "learner.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise TransportError("learner_ended", f"the learner ended; {log} ends with:\n{tail}")

    async def _settle(self) -> None:
        """Until the learner has archived all that was answered and survived."""
        counts = self.player.statistics()
        due = counts["events_answered"] - counts["events_lost_in_linger"]
        watch = self.watch
        await watch.wait(
            f"the archive of {due:,} events",
            lambda: watch.status is not None and watch.status.events_archived >= due,
            SETTLE_S,
        )
        await watch.wait(
            "the last micro-batch",
            lambda: watch.status is not None and not watch.status.counters["batches_waiting"],
            SETTLE_S,
        )

    async def _last_words(self) -> None:
        """A report of every device from after the end."""
        since_s = time.time()
        await self.watch.wait(
            "the devices' last reports",
            lambda: all(report.time_s >= since_s for report in self.watch.reports.values()),
            READY_S,
        )

    def _plan_faults(self, bus: Bus, times: dict[str, float], family: str) -> None:
        actions = {
            "flip": self._flip,
            "kill": self._kill,
            "forge wrong key": lambda: self._forge(bus, "forge wrong key", family),
            "forge learner alone": lambda: self._forge(bus, "forge learner alone", family),
            "poison": self._poison,
        }
        for name, time_s in times.items():
            self.faults[name] = FaultRow(name, "to come")
            device = "JFK" if name == "kill" else None
            self.player.at(time_s, actions[name], device=device)

    def _note(self, name: str, state: str, *, ok: bool | None = None) -> None:
        self.faults[name] = FaultRow(name, state, ok)

    async def _flip(self) -> None:
        self._note("flip", "a candidate learns flipped labels")
        outcome = await self._attack("flip")
        self._note("flip", f"offline gate: {outcome}", ok=outcome == "fail")

    async def _poison(self) -> None:
        self._note("poison", "the hold-out lies")
        sha256 = await self._attack("poison")
        if len(sha256) != 64:
            self._note("poison", f"never released: {sha256}", ok=False)
            return
        self._note("poison", "passed offline, on the canary")
        release = self._release_of(sha256)
        await self.watch.wait(
            "the verdict on the poisoned release", lambda: release in self.ended(), SETTLE_S
        )
        reason = self.ended()[release]
        self._note("poison", f"canary: {reason}", ok=reason == "harm")

    def ended(self) -> dict[str, str]:
        """How each decided release ended: the reason by its name."""
        decisions = self.watch.decisions(self.family)
        return {each["release"]: each["reason"] for each in decisions}

    def _release_of(self, sha256: str) -> str:
        lines = (self._home.lineage / "lineage.jsonl").read_text().splitlines()
        entries = (json.loads(line) for line in lines)
        return next(
            str(e["release"]) for e in entries if e["kind"] == "release" and e["sha256"] == sha256
        )

    async def _attack(self, name: str) -> str:
        folder = self._home.root / "attacks"
        (folder / name).touch()
        result = folder / f"{name}.result"
        await self.watch.wait(f"the outcome of {name}", result.exists, ATTACK_S)
        return result.read_text()

    async def _kill(self) -> None:
        process = self._processes_of["JFK"]
        epoch = self.watch.reports["JFK"].epoch
        self._killed.add("JFK")
        process.kill()
        self._note("kill", "JFK got SIGKILL")
        await self.watch.wait(
            "JFK's return", lambda: self.watch.reports["JFK"].epoch > epoch, READY_S
        )
        self._killed.discard("JFK")
        self._note("kill", "JFK is back with its windows", ok=True)

    async def _forge(self, bus: Bus, name: str, family: str) -> None:
        data = (self._home.registry / f"{self._home.of(family).origin().sha256}.onnx").read_bytes()
        release = ReleaseFile(family, name.replace(" ", "-"), 1_000_000, data)
        before, refusing = self.watch.refusals(), len(self.watch.reports)
        push = faults.forge_wrong_key if "wrong" in name else faults.forge_learner_alone
        await push(self._home.root, bus, release, time.time())
        self._note(name, "pushed through the broker")
        await self.watch.wait(
            "a refusal", lambda: self.watch.refusals() >= before + refusing, SETTLE_S
        )
        self._note(name, f"refused by {refusing} devices", ok=True)

    async def _show(self, url: str) -> None:
        with LiveView() as view:
            seen, seen_s, rate = 0, time.monotonic(), 0.0
            while True:
                archived = self.watch.status.events_archived if self.watch.status else 0
                now_s = time.monotonic()
                if now_s - seen_s >= 1:
                    rate, seen, seen_s = (archived - seen) / (now_s - seen_s), archived, now_s
                view.update(
                    ViewState(
                        version=version("headwater"),
                        broker_url=url,
                        elapsed_s=now_s - self._started_s,
                        event_time_s=self._event_time_s(),
                        devices=[
                            self._device_row(r) for _, r in sorted(self.watch.reports.items())
                        ],
                        learner=self._learner_row(rate),
                        rollout=self.watch.rollout(self.family),
                        faults=list(self.faults.values()),
                    )
                )
                await asyncio.sleep(VIEW_S)

    def _event_time_s(self) -> float | None:
        reached_s = min(self.player.event_times().values())
        return reached_s if math.isfinite(reached_s) else None

    def _device_row(self, report: Report) -> DeviceRow:
        latency = Histogram(list(report.predict_us))
        lives = sum(device == report.device for device, _ in self.watch.lives)
        return DeviceRow(
            name=report.device,
            state="killed" if report.device in self._killed else "recovered" if lives > 1 else "up",
            arms={arm.arm: arm.release for arm in report.arms},
            p50_us=latency.quantile(0.5),
            p99_us=latency.quantile(0.99),
            log_pending=report.log_pending,
        )

    def _learner_row(self, rate: float) -> LearnerRow:
        status = self.watch.status
        if status is None:
            return LearnerRow()
        weights = self.watch.family(self.family).get("weights", {})
        p50_s, p99_s = quantiles(status.freshness_s)
        return LearnerRow(
            events_per_s=rate,
            archived=status.events_archived,
            cycle=status.counters["cycles"],
            weights=weights,
            freshness_p50_s=p50_s,
            freshness_p99_s=p99_s,
        )
