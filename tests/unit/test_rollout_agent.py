"""The rollout agent over a real runtime, a broker in memory and an update client that obeys."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from edge_runtime.bus.memory import MemoryBroker, MemoryBus
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import HeadwaterError, RequestError, TransportError, TrustError
from edge_runtime.inference.package import Interface
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.agent import Agent
from edge_runtime.rollout.plan import Plan, PlanArm, Variant, Window, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import Freshness
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import Mark, Report

SCHEDULED = Event("scheduled", 1.36e9, {"carrier": "UA", "distance": 998.0})
WritePackage = Callable[..., tuple[Path, str]]


@dataclass
class Orders:
    """An update client that hands out `current`, or fails as told; packages come from `files`."""

    current: Plan | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    fails: dict[str, HeadwaterError] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    freshness: Freshness = field(default_factory=Freshness)
    lowest: int = 0
    absent: dict[str, HeadwaterError] = field(default_factory=dict)

    def refresh(self) -> None:
        self._called("refresh")

    def plan(self, family: str, /) -> Plan:
        self._called("plan")
        if self.current is None:
            raise TransportError("no_plan", f"no plan for {family}")
        return self.current

    def fetch(self, _arm: PlanArm, package: Variant, shelf: Shelf, /) -> Path:
        self._called("fetch")
        if package.sha256 in self.absent:
            raise self.absent[package.sha256]
        return shelf.put_whole(package.sha256, self.files[package.sha256])

    def check_course(self, *_plans: object) -> None:
        self._called("course")

    def lowest_counter(self, _family: str, /) -> int:
        return self.lowest

    def confirm(self, plan: Plan, /) -> None:
        self._called(f"confirm {plan.seq}")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.current_thread().name)
        failure = self.fails.get(name.split(maxsplit=1)[0])
        if failure is not None:
            raise failure


@dataclass
class Device:
    """What a test plays with."""

    runtime: Runtime
    orders: Orders
    agent: Agent
    bus: MemoryBus
    broker: MemoryBroker
    write_package: WritePackage
    clock: ManualClock

    def arm(
        self,
        release: str,
        bias: float = 0.0,
        weight: float = 1.0,
        counter: int = 1,
        **more: float,
    ) -> PlanArm:
        path, sha256 = self.write_package(bias, **more)
        self.orders.files[sha256] = path.read_bytes()
        return PlanArm(release, model_path("toy", release), sha256, counter, weight)

    def two_variants(self, release: str, slower: int, **more: float) -> PlanArm:
        """`slower` 0 or 1 says which of the two takes longer; `more` spoils the default one."""
        found = []
        for index, path in enumerate((model_path("toy", release), model_path("toy", release, "b"))):
            ballast = 700 if index == slower else 0
            extra = more if index == 0 else {}
            file, sha256 = self.write_package(ballast=ballast, **extra)
            self.orders.files[sha256] = file.read_bytes()
            found.append(Variant("ab"[index], path, sha256))
        own = found[0]
        return PlanArm(release, own.path, own.sha256, 1, 1.0, tuple(found))

    def answering(self) -> str:
        return self.runtime.predict("toy", SCHEDULED).release

    def arms(self) -> list[tuple[str, str]]:
        return [(arm.arm, arm.release) for arm in self.runtime.report({}).arms]


@pytest.fixture
def play(tmp_path: Path, write_package: WritePackage) -> Callable[..., None]:
    """`play(stage)` runs `stage(device)`; the agent does not run by itself unless told to."""
    config = EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        attributes={"airport": "EWR"},
    )

    def run(stage: Callable[[Device], Awaitable[None]]) -> None:
        async def scene() -> None:
            broker = MemoryBroker()
            bus = await broker.connect()
            await bus.ensure_stream(
                subjects.STATE_STREAM, subjects.STATE_ALL, max_bytes=1 << 20, discard_new=False
            )
            clock = ManualClock(1.36e9)  # at 17:46:40
            with Runtime.open(config, clock=clock) as runtime:
                orders = Orders()
                agent = Agent(
                    runtime,
                    orders,
                    runtime.shelf,
                    bus,
                    attributes=config.attributes,
                    poll_s=1000.0,
                    clock=clock,
                    durable=lambda: [
                        Mark(runtime.log.epoch, "event", runtime.log.durable("event")[1])
                    ],
                )
                device = Device(runtime, orders, agent, bus, broker, write_package, clock)
                await asyncio.wait_for(stage(device), 4)

        asyncio.run(scene())

    return run


def test_a_plan_is_fetched_served_confirmed_and_remembered(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=3, stable=device.arm("r1"))
        await device.agent.check()
        assert device.answering() == "r1"
        assert device.orders.calls == ["refresh", "plan", "fetch", "confirm 3"]
        assert device.runtime.shelf.load_current("toy") == device.orders.current
        assert device.runtime.report({}).plan_seq == 3

    play(stage)


def test_what_may_block_happens_on_the_update_thread(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=1, stable=device.arm("r1"))
        await device.agent.check()
        assert {name.removesuffix("_0") for name in device.orders.threads} == {"update"}

    play(stage)


def test_the_same_plan_is_done_once(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=1, stable=device.arm("r1"))
        await device.agent.check()
        await device.agent.check()
        assert device.orders.calls.count("fetch") == 1
        assert device.orders.calls.count("confirm 1") == 1
        assert device.agent.statistics()["applied"] == 1

    play(stage)


@pytest.mark.parametrize(
    ("selector", "arms"),
    [
        ({"airport": "EWR"}, [("stable", "r1"), ("canary", "r2")]),
        ({"airport": "JFK"}, [("stable", "r1")]),
        ({}, [("stable", "r1"), ("canary", "r2")]),
    ],
)
def test_the_selector_says_who_gets_the_canary(
    play: Callable[..., None], selector: dict[str, str], arms: list[tuple[str, str]]
) -> None:
    async def stage(device: Device) -> None:
        stable, canary = device.arm("r1", weight=0.5), device.arm("r2", 1.0, weight=0.5)
        device.orders.current = Plan(
            family="toy", seq=1, stable=stable, canary=canary, selector=selector
        )
        await device.agent.check()
        assert device.arms() == arms

    play(stage)


def test_a_promotion_and_a_rollback_are_just_plans(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        first, second = device.arm("r1"), device.arm("r2", 1.0)
        served = []
        for seq, stable in enumerate([first, second, first], start=1):
            device.orders.current = Plan(family="toy", seq=seq, stable=stable)
            await device.agent.check()
            served.append(device.answering())
        assert served == ["r1", "r2", "r1"]
        counters = device.runtime.counters()
        assert (counters["swaps"], counters["requests_dropped"]) == (3, 0)

    play(stage)


def test_the_current_and_the_previous_release_stay_on_the_shelf_and_no_other(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        arms = [device.arm(f"r{number}", float(number)) for number in range(3)]
        for seq, stable in enumerate(arms, start=1):
            device.orders.current = Plan(family="toy", seq=seq, stable=stable)
            await device.agent.check()
        found = [device.runtime.shelf.path_of(arm.sha256) is not None for arm in arms]
        assert found == [False, True, True]

    play(stage)


def test_what_a_restart_would_serve_stays_though_its_successor_could_not_be_remembered(
    play: Callable[..., None],
) -> None:
    """One family is settled while another runs what the disk would not remember."""

    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=1, stable=device.arm("r1"))
        await device.agent.check()
        shelf, state = device.runtime.shelf, device.runtime.config.state_dir / "shelf"
        device.orders.current = Plan(family="toy", seq=2, stable=device.arm("r2", 1.0))
        (state / "current").rename(state / "aside")
        (state / "current").write_bytes(b"a file where a directory belongs")
        await device.agent.check()
        assert device.answering() == "r2"
        (state / "current").unlink()
        (state / "aside").rename(state / "current")
        agent = Agent(
            TwoFamilies(device.runtime),
            Others(device),
            shelf,
            device.bus,
            attributes={},
            poll_s=1000.0,
        )
        await agent.check()
        assert shelf.load_current("other") is not None
        current = shelf.load_current("toy")
        assert current is not None
        assert current.seq == 1
        assert shelf.path_of(current.stable.sha256) is not None

    play(stage)


class TwoFamilies:
    """A device that runs another family beside `toy`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self.device = runtime, runtime.device
        self.families = ["other", "toy"]
        self._other: Plan | None = None

    def current(self, family: str) -> Plan | None:
        return self._runtime.current(family) if family == "toy" else self._other

    def resident(self, family: str) -> Sequence[Arm]:
        return self._runtime.resident(family) if family == "toy" else ()

    async def adopt(self, family: str, arms: Sequence[Arm], plan: Plan | None) -> None:
        assert (family, len(arms)) == ("other", 1)
        self._other = plan

    def report(self, refused: dict[str, int]) -> Report:
        return self._runtime.report(refused)


class Others(Orders):
    """Has a plan for `other`, and none for `toy`."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        path, sha256 = device.write_package(2.0)
        self.files[sha256] = path.read_bytes()
        arm = PlanArm("o1", model_path("other", "o1"), sha256, 1, 1.0)
        self.wanted = Plan(family="other", seq=1, stable=arm)

    def plan(self, family: str, /) -> Plan:
        if family == "other":
            return self.wanted
        raise TransportError("unreachable", "away")


@pytest.mark.parametrize("slower", [0, 1])
def test_the_faster_variant_serves_is_reported_and_stays_alone(
    play: Callable[..., None], slower: int
) -> None:
    async def stage(device: Device) -> None:
        stable = device.two_variants("r1", slower)
        device.orders.current = Plan(family="toy", seq=1, stable=stable)
        await device.agent.check()
        (arm,) = device.runtime.report({}).arms
        assert (arm.release, arm.variant) == ("r1", "ba"[slower])
        assert arm.run_us > 0
        kept = [device.runtime.shelf.path_of(each.sha256) is not None for each in stable.variants]
        assert kept == [slower == 1, slower == 0]

    play(stage)


def test_a_plan_of_the_same_release_fetches_and_chooses_nothing_anew(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        stable = device.two_variants("r1", slower=0)
        for seq in (1, 2):
            device.orders.current = Plan(family="toy", seq=seq, stable=stable)
            await device.agent.check()
        assert device.agent.statistics()["applied"] == 2
        assert device.orders.calls.count("fetch") == 2  # both; then what runs is at hand

    play(stage)


def test_a_variant_that_is_wrong_here_is_quarantined_and_the_other_serves(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        stable = device.two_variants("r1", slower=1, model_bias=1.5)
        device.orders.current = Plan(family="toy", seq=1, stable=stable)
        await device.agent.check()
        assert [arm.variant for arm in device.runtime.report({}).arms] == ["b"]
        assert device.runtime.shelf.quarantined() == {stable.sha256: "golden_mismatch"}

    play(stage)


def test_what_was_left_is_not_followed_again_until_a_plan_names_other_packages(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        good, mended = device.arm("r1", 1.0), device.arm("r3", 2.0)
        bad = device.two_variants("r2", slower=1)
        for seq, stable in enumerate([good, bad], start=1):
            device.orders.current = Plan(family="toy", seq=seq, stable=stable)
            await device.agent.check()
        assert device.runtime.rollback("toy", "it disappoints") == "r1"
        fetched = device.orders.calls.count("fetch")
        await device.agent.check()
        assert device.answering() == "r1"
        assert device.agent.statistics()["refused_release_quarantined"] == 1
        assert device.agent.statistics()["waiting_quarantine"] == 1
        device.orders.current = Plan(family="toy", seq=3, stable=device.arm("r4", 4.0), canary=bad)
        await device.agent.check()
        assert device.arms() == [("stable", "r4")]
        assert device.agent.statistics()["refused_release_quarantined"] == 2
        assert device.orders.calls.count("fetch") == fetched + 1
        device.orders.current = Plan(family="toy", seq=4, stable=mended)
        await device.agent.check()
        assert device.answering() == "r3"

    play(stage)


def test_a_release_that_is_left_while_it_loads_does_not_serve(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        good, bad = device.arm("r1"), device.arm("r2", 1.0)
        device.orders.current = Plan(family="toy", seq=1, stable=good)
        await device.agent.check()

        def leave_it(_path: Path) -> None:
            device.runtime.shelf.quarantine(bad.sha256, "rolled_back")

        agent = Agent(
            device.runtime,
            device.orders,
            device.runtime.shelf,
            device.bus,
            attributes={},
            poll_s=1000.0,
            prove=leave_it,
        )
        device.orders.current = Plan(family="toy", seq=2, stable=bad)
        await agent.check()
        assert device.answering() == "r1"
        assert agent.statistics()["refused_release_quarantined"] == 1

    play(stage)


@pytest.mark.parametrize("step", ["refresh", "plan", "fetch"])
def test_a_refusal_is_counted_by_its_code_and_the_current_release_serves(
    play: Callable[..., None], step: str
) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=1, stable=device.arm("r1"))
        await device.agent.check()
        device.orders.current = Plan(family="toy", seq=2, stable=device.arm("r2", 1.0))
        device.orders.fails[step] = TrustError("below_threshold", "one signature is missing")
        await device.agent.check()
        assert device.answering() == "r1"
        assert device.agent.statistics()["refused_below_threshold"] == 1
        del device.orders.fails[step]
        await device.agent.check()
        assert device.answering() == "r2"

    play(stage)


def test_a_package_that_fails_here_is_never_tried_again(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=1, stable=device.arm("r1"))
        await device.agent.check()
        bad = device.arm("r2", 1.0, model_bias=1.5)
        device.orders.current = Plan(family="toy", seq=2, stable=bad)
        await device.agent.check()
        await device.agent.check()
        assert device.answering() == "r1"
        assert device.runtime.shelf.quarantined() == {bad.sha256: "golden_mismatch"}
        statistics = device.agent.statistics()
        assert statistics["refused_golden_mismatch"] == 1
        assert statistics["refused_release_quarantined"] == 1

    play(stage)


def test_a_plan_that_could_not_be_confirmed_is_confirmed_later(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=4, stable=device.arm("r1"))
        device.orders.fails["confirm"] = TransportError("unreachable", "away")
        await device.agent.check()
        assert device.answering() == "r1"
        assert device.runtime.shelf.load_current("toy") == device.orders.current
        del device.orders.fails["confirm"]
        await device.agent.check()
        assert device.runtime.shelf.load_current("toy") == device.orders.current
        assert device.orders.calls.count("fetch") == 1
        assert device.orders.calls.count("confirm 4") == 2

    play(stage)


def test_r7_what_is_below_the_floor_is_nothing_to_go_back_to(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=1, stable=device.arm("r1"))
        await device.agent.check()
        device.orders.current = Plan(family="toy", seq=2, stable=device.arm("r2", 1.0, counter=2))
        device.orders.lowest = 2
        device.orders.fails["confirm"] = TransportError("unreachable", "away")
        await device.agent.check()
        assert device.answering() == "r2"
        assert device.runtime.shelf.load_previous("toy") is None
        with pytest.raises(RequestError, match="nothing_to_roll_back"):
            device.runtime.rollback("toy", "a test")
        assert device.answering() == "r2"

    play(stage)


def test_an_absent_network_is_no_refusal(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.fails["refresh"] = TransportError("unreachable", "away")
        await device.agent.check()
        statistics = device.agent.statistics()
        assert statistics["unreachable"] == 1
        assert not [name for name in statistics if name.startswith("refused")]

    play(stage)


async def next_report(device: Device, wanted: Callable[[Report], bool]) -> Report:
    """The first report for which `wanted` holds."""
    found: asyncio.Future[Report] = asyncio.get_running_loop().create_future()

    async def look(message: object) -> None:
        report = codec.decode_report(message.data)  # type: ignore[attr-defined]
        if wanted(report) and not found.done():
            found.set_result(report)

    subscription = await device.bus.subscribe(subjects.report("EWR"), look)
    try:
        return await found
    finally:
        await subscription.close()


async def with_agent(device: Device, wait: Awaitable[Report]) -> Report:
    running = asyncio.create_task(device.agent.run())
    try:
        return await wait
    finally:
        running.cancel()
        await asyncio.wait([running])


def test_a_running_agent_checks_at_once_and_reports_what_serves(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=9, stable=device.arm("r1"))
        report = await with_agent(device, next_report(device, lambda report: report.plan_seq == 9))
        assert [(arm.arm, arm.release) for arm in report.arms] == [("stable", "r1")]
        assert report.counters["swaps"] == 1
        assert report.durable == [Mark(device.runtime.log.epoch, "event", 0)]

    play(stage)


def test_a_nudge_makes_it_check_and_refusals_are_reported(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = Plan(family="toy", seq=1, stable=device.arm("r1"))

        async def nudge_until_refused() -> Report:
            await next_report(device, lambda report: report.plan_seq == 1)
            device.orders.fails["plan"] = TrustError("expired", "too old")
            waiting = asyncio.create_task(next_report(device, lambda report: bool(report.refused)))
            await device.bus.send(subjects.REFRESH, hashlib.sha256(b"any").digest())
            return await waiting

        report = await with_agent(device, nudge_until_refused())
        assert report.refused == {"expired": 1}
        assert device.agent.statistics()["nudges"] == 1

    play(stage)


def test_a_report_that_cannot_be_sent_stops_nothing(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        async def outage() -> Report:
            device.broker.down()
            device.orders.current = Plan(family="toy", seq=2, stable=device.arm("r1"))
            device.agent.nudge()
            while device.runtime.current("toy") is None:
                await asyncio.to_thread(lambda: None)
            device.broker.up()
            return await next_report(device, lambda report: report.plan_seq == 2)

        assert (await with_agent(device, outage())).plan_seq == 2

    play(stage)


def test_f5_metadata_that_was_held_back_is_told_in_report_and_status(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        device.orders.freshness = Freshness((2, 41), 1.35e9, stale=True)
        report = await with_agent(device, next_report(device, lambda _report: True))
        assert report.counters["metadata_stale"] == 1
        assert (report.floor, report.issued_s) == ([2, 41], 1.35e9)
        told = device.agent.statistics()
        assert (told["metadata_stale"], told["metadata_issued_s"]) == (1, 1_350_000_000)

    play(stage)


def test_r10_without_a_way_for_reports_plans_are_followed_and_the_next_report_tells_all(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        async def days() -> Report:
            streams = dict(device.broker.streams)
            device.broker.streams.clear()  # what is published has nowhere to go; all else works
            for number in range(1, 6):
                device.orders.current = Plan(
                    family="toy", seq=number, stable=device.arm(f"r{number}", float(number))
                )
                device.agent.nudge()
                while device.runtime.shelf.load_current("toy") != device.orders.current:
                    await asyncio.to_thread(lambda: None)
                assert device.answering() == f"r{number}"
            assert device.agent.statistics()["reports"] == 0
            assert device.runtime.shelf.quarantined() == {}
            device.broker.streams |= streams
            return await next_report(device, lambda report: report.counters["predictions"] == 5)

        report = await with_agent(device, days())
        assert (report.plan_seq, report.counters["swaps"]) == (5, 5)
        assert [arm.release for arm in report.arms] == ["r5"]

    play(stage)


EVENING = Window(18 * 60, 19 * 60)


def on_trial(device: Device, seq: int, *releases: str, **more: object) -> Plan:
    """A plan whose first release is stable; the others, with higher counters, are on trial."""
    arms = [
        device.arm(name, float(number), weight=0.5, counter=number)
        for number, name in enumerate(releases, start=1)
    ]
    canary, others = (arms[1], tuple(arms[2:])) if arms[1:] else (None, ())
    return Plan(family="toy", seq=seq, stable=arms[0], canary=canary, others=others, **more)  # type: ignore[arg-type]


def test_outside_of_its_window_nothing_changes_and_in_it_the_plan_is_followed(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = on_trial(device, 1, "r1")
        await device.agent.check()
        device.orders.current = on_trial(device, 2, "r1", "r2", window=EVENING)
        for seconds in (0, 799):
            device.clock.advance(seconds)
            await device.agent.check()
            assert device.arms() == [("stable", "r1")]
            assert device.runtime.report({}).plan_seq == 1
        assert device.agent.statistics()["waiting_window"] == 1
        assert device.agent.waits.told() == {
            "toy": {"for": "window", "until": "2013-02-04T18:00:00Z"}
        }
        device.clock.advance(1)
        await device.agent.check()
        assert device.arms() == [("stable", "r1"), ("canary", "r2")]
        assert "waiting_window" not in device.agent.statistics()
        assert device.agent.waits.told() == {}

    play(stage)


def test_it_wakes_by_itself_when_a_wait_ends_and_tells_of_it(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = on_trial(device, 1, "r1")
        await device.agent.check()
        device.orders.current = on_trial(device, 2, "r1", "r2", window=EVENING)
        device.clock.advance(799.99)

        async def wait() -> Report:
            waiting = await next_report(device, lambda r: "waiting_window" in r.counters)
            assert (waiting.plan_seq, waiting.counters["waiting_window"]) == (1, 1)
            device.clock.advance(0.01)
            return await next_report(device, lambda report: report.plan_seq == 2)

        report = await with_agent(device, wait())
        assert [arm.release for arm in report.arms] == ["r1", "r2"]
        assert device.agent.statistics()["nudges"] == 0

    play(stage)


def test_a_trial_ends_at_its_time_without_a_network_and_after_a_restart(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = on_trial(device, 1, "r1", "r2", not_after_s=1.36e9 + 60)
        await device.agent.check()
        device.orders.fails["refresh"] = TransportError("unreachable", "away")
        device.clock.advance(59)
        await device.agent.check()
        assert len(device.arms()) == 2
        device.clock.advance(1)
        await device.agent.check()
        assert device.arms() == [("stable", "r1")]
        kept = device.runtime.shelf.load_current("toy")
        assert kept is not None
        assert kept.trials == []
        del device.orders.fails["refresh"]
        await device.agent.check()
        statistics = device.agent.statistics()
        assert (statistics["trials_ended"], statistics["applied"]) == (1, 2)

    play(stage)


def test_the_time_is_never_before_what_was_signed(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = on_trial(device, 1, "r1", "r2", not_after_s=1.37e9)
        await device.agent.check()
        assert len(device.arms()) == 2
        device.orders.freshness = Freshness((1, 2), 1.37e9)
        await device.agent.check()
        assert device.arms() == [("stable", "r1")]

    play(stage)


def test_several_trials_are_loaded_beside_the_stable_release(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = on_trial(device, 1, "r1", "r2", "r3", "r4")
        await device.agent.check()
        names = ["stable", "canary", "trial2", "trial3"]
        assert device.arms() == list(zip(names, ["r1", "r2", "r3", "r4"], strict=True))

    play(stage)


def test_a_trial_that_fails_here_keeps_nothing_else_from_being_served(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        plan = on_trial(device, 1, "r1", "r2", "r3")
        bad = device.arm("r2", 1.0, model_bias=9.5, counter=2)
        device.orders.current = msgspec.structs.replace(plan, canary=bad)
        for number in (1, 2):
            await device.agent.check()
            assert device.arms() == [("stable", "r1"), ("canary", "r3")]
            assert device.runtime.report({}).plan_seq == 1
            statistics = device.agent.statistics()
            assert statistics["refused_golden_mismatch"] == 1
            assert statistics["refused_release_quarantined"] == number
            assert statistics["applied"] == 1
        assert device.runtime.shelf.quarantined() == {bad.sha256: "golden_mismatch"}

    play(stage)


def test_a_trial_that_takes_other_events_is_left_out_and_may_become_stable(
    play: Callable[..., None], toy_interface: Interface
) -> None:
    async def stage(device: Device) -> None:
        plan = on_trial(device, 1, "r1", "r2", "r3")
        other = msgspec.structs.replace(toy_interface, lateness_s_max=1.0)
        path, sha256 = device.write_package(2.0, interface=other)
        device.orders.files[sha256] = path.read_bytes()
        new = PlanArm("r2", model_path("toy", "r2"), sha256, 2, 0.5)
        device.orders.current = msgspec.structs.replace(plan, canary=new)
        await device.agent.check()
        assert device.arms() == [("stable", "r1"), ("canary", "r3")]
        assert device.agent.statistics()["refused_bad_arms"] == 1
        assert device.runtime.shelf.quarantined() == {}
        device.orders.current = Plan(family="toy", seq=2, stable=new)
        await device.agent.check()
        assert device.arms() == [("stable", "r2")]

    play(stage)


@pytest.mark.parametrize("error", [TransportError("absent", "?"), TrustError("wrong_length", "?")])
def test_a_trial_that_cannot_be_fetched_comes_when_it_can(
    play: Callable[..., None], error: HeadwaterError
) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = plan = on_trial(device, 1, "r1", "r2", "r3")
        assert plan.canary is not None
        device.orders.absent[plan.canary.sha256] = error
        for _ in range(2):
            await device.agent.check()
            assert device.arms() == [("stable", "r1"), ("canary", "r3")]
        assert device.agent.statistics()["applied"] == 1
        device.orders.absent.clear()
        await device.agent.check()
        assert device.arms() == [("stable", "r1"), ("canary", "r2"), ("trial2", "r3")]
        assert device.runtime.shelf.quarantined() == {}
        assert device.runtime.shelf.load_current("toy") == plan

    play(stage)


def test_what_is_withdrawn_goes_though_the_new_stable_release_cannot_be_had(
    play: Callable[..., None],
) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = on_trial(device, 1, "r1", "r2")
        await device.agent.check()
        new = device.arm("r3", 3.0, counter=3)
        device.orders.absent[new.sha256] = TransportError("absent", "?")
        device.orders.current = Plan(family="toy", seq=2, stable=new)
        await device.agent.check()
        assert device.arms() == [("stable", "r1")]
        device.orders.absent.clear()
        await device.agent.check()
        assert device.arms() == [("stable", "r3")]

    play(stage)


def test_the_fallback_is_brought_before_it_is_needed_and_stays(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        back = device.arm("r0", 8.0, counter=0)
        plans = [on_trial(device, seq, f"r{seq}", fallback=back) for seq in (1, 2)]
        device.orders.current = plans[0]
        device.orders.absent[back.sha256] = TransportError("absent", "?")
        await device.agent.check()
        assert device.answering() == "r1"
        assert device.runtime.shelf.path_of(back.sha256) is None
        device.orders.absent.clear()
        await device.agent.check()
        device.orders.current = plans[1]
        await device.agent.check()
        assert device.runtime.shelf.path_of(back.sha256) is not None
        assert device.agent.statistics()["applied"] == 2

    play(stage)


def test_a_plan_that_jumps_is_refused_and_told(play: Callable[..., None]) -> None:
    async def stage(device: Device) -> None:
        device.orders.current = on_trial(device, 1, "r1")
        await device.agent.check()
        device.orders.fails["course"] = TrustError("unapproved_jump", "from 1 to 100")
        device.orders.current = on_trial(device, 2, "r1", "r2")
        await device.agent.check()
        assert device.arms() == [("stable", "r1")]
        assert device.agent.statistics()["refused_unapproved_jump"] == 1

    play(stage)
