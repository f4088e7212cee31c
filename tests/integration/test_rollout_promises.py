"""The promises about rollout that a device keeps (C1, C7, C8, C9), each a test of its number.

Plans and releases are signed by a real publisher and come through the real update client into a
real runtime; the broker is in memory, the clock moves when it is told to.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuf.api.metadata import Targets

from cloud_learner import approvals, orders
from cloud_learner.approvals import Approval
from cloud_learner.orders import Consent, Order
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import (
    ReleaseFile,
    blob_messages,
    expiry,
    look,
    opened,
    plan_target,
    publish_below,
    push,
    sealed,
)
from edge_runtime.bus.base import Bus
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import RequestError, TrustError
from edge_runtime.rollout.agent import Agent
from edge_runtime.rollout.plan import (
    Plan,
    PlanArm,
    Stage,
    Window,
    arms_for,
    bucket,
    encode_plan,
    model_path,
)
from edge_runtime.runtime import Runtime
from edge_runtime.update.approval import APPROVALS_ROLE
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher

NOW_S = 1_800_000_000.0
"""At 8:00, UTC."""
WritePackage = Callable[..., tuple[Path, str]]
VECTORS = Path(__file__).parents[2] / "proto" / "vectors" / "buckets.json"
LATE = next(f"d{n}" for n in range(999) if bucket("s", f"d{n}") > 0.9)
"""A device that a trial of salt `s` reaches last."""


class Device:
    """A runtime with an agent over a real update client; it looks for updates when told to."""

    def __init__(self, scene: Scene, name: str, step_max: float, hold: bool) -> None:
        folder = scene.folder / name
        config = EdgeConfig(
            device=name, families=["toy"], state_dir=folder, socket=folder / "edge.sock"
        )
        self.runtime = scene.ends.enter_context(Runtime.open(config, clock=scene.clock))
        fetcher = BusFetcher(scene.bus, asyncio.get_running_loop())
        root = (scene.home / "trust" / "root.json").read_bytes()
        client = UpdateClient(folder / "update", root, fetcher, scene.clock, step_max=step_max)
        self.client = scene.ends.enter_context(closing(client))
        self.agent = Agent(
            self.runtime,
            self.client,
            self.runtime.shelf,
            scene.bus,
            attributes={},
            poll_s=1000.0,
            hold=hold,
            clock=scene.clock,
        )

    async def look(self) -> list[str]:
        """What runs after a look for updates."""
        await self.agent.check()
        return [arm.release for arm in self.runtime.report({}).arms]

    def count(self, name: str) -> int:
        return self.agent.statistics().get(name, 0)


class Scene:
    """A home that publishes releases `r1`, `r2`, ... of one family."""

    def __init__(self, folder: Path, bus: Bus, write_package: WritePackage) -> None:
        self.folder, self.bus, self.clock = folder, bus, ManualClock(NOW_S)
        self.home, self.ends = folder / "home", ExitStack()
        self._write = write_package
        keys.create(self.home, ["toy"], self.clock)
        orders.create(folder / "op.pem", self.home / "keys" / "operators" / "op.pub")
        self.publisher = Publisher(self.home, bus, keys.load(self.home), self.clock)
        self.passed: set[str] = set()

    def be_old(self) -> None:
        """Become a home of before there was a role for approvals."""
        path = self.home / "tuf" / "1.targets.json"
        document = opened(Targets, path.read_bytes(), None, "targets")
        del document.delegations.roles[APPROVALS_ROLE]
        path.write_bytes(sealed(document, [keys.load_signer(self.home, "targets")]))
        self.publisher = Publisher(self.home, self.bus, keys.load(self.home), self.clock)

    def device(self, name: str = LATE, step_max: float = 100.0, hold: bool = False) -> Device:
        return Device(self, name, step_max, hold)

    def file(self, number: int) -> ReleaseFile:
        data = self._write(float(number))[0].read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        self.passed.add(sha256)
        verdict = {"outcome": "pass", "rules": ["r"], "sha256": sha256}
        return ReleaseFile("toy", f"r{number}", number, data, verdict)

    def arm(self, number: int) -> PlanArm:
        file = self.file(number)
        return PlanArm(file.release, file.path, file.sha256, number, 0.5)

    def plan(
        self, seq: int, stable: int, canary: int = 0, *percents: float, **more: object
    ) -> Plan:
        """A plan whose trial began with plan 2, one stage with each plan since then."""
        stages = tuple(Stage(2 + at, percent, NOW_S) for at, percent in enumerate(percents))
        return Plan(
            family="toy",
            seq=seq,
            stable=self.arm(stable),
            canary=self.arm(canary) if canary else None,
            salt="s",
            stages=stages,
            **more,  # type: ignore[arg-type]
        )

    async def publish(self, plan: Plan, new: int = 0, approval: Approval | None = None) -> Plan:
        await self.publisher.publish(self.file(new) if new else None, plan, approval)
        return plan

    async def begun(self, device: Device) -> None:
        """One release that serves, and another on trial on one device in a hundred."""
        await self.publish(self.plan(1, 1), 1)
        assert await device.look() == ["r1"]
        await self.publish(self.plan(2, 1, 2, 1), 2)
        assert await device.look() == ["r1"]

    def consent(self, *releases: int, percent: float = 100.0, family: str = "toy") -> Order:
        hashes = [self.file(number).sha256 for number in releases]
        wish = Consent(family=family, packages=hashes, percent=percent, reason="a fire")
        return orders.signed(wish, "op", self.folder / "op.pem")

    def approve(self, plan: Plan, order: Order, by: str = "gate") -> Approval:
        operators, signer = self.home / "keys" / "operators", keys.load_signer(self.home, by)
        return approvals.approve(
            encode_plan(plan), order, operators, self.passed.__contains__, signer
        )

    async def steal(self, plan: Plan, approval: Approval | None = None) -> None:
        """What a thief of the rollout key, and of both online keys, publishes."""
        root = self.publisher._root
        target, data = plan_target(plan)
        if approval is not None:
            facts = {"approval": msgspec.to_builtins(approval)}
            target.unrecognized_fields["custom"] = facts
        version = (await look(self.bus, root)).next("plans")
        document = Targets(version=version, expires=expiry(NOW_S, 7), targets={target.path: target})
        await push(self.bus, blob_messages(data))
        await publish_below(
            self.bus,
            root,
            {"plans": sealed(document, [keys.load_signer(self.home, "rollout")])},
            snapshot_signer=keys.load_signer(self.home, "snapshot"),
            timestamp_signer=keys.load_signer(self.home, "timestamp"),
            now_s=self.clock.now_s(),
        )


@pytest.fixture
def play(tmp_path: Path, write_package: WritePackage) -> Callable[..., None]:
    def run(stage: Callable[[Scene], Awaitable[None]]) -> None:
        async def whole() -> None:
            scene = Scene(tmp_path, await MemoryBroker().connect(), write_package)
            with scene.ends:
                await stage(scene)

        asyncio.run(whole())

    return run


# C1: the same bucket anywhere; a higher percentage only adds, a lower one only removes.


def trying(salt: str, percent: float, devices: int) -> set[int]:
    """Which of so many devices a trial reaches."""
    one = PlanArm("r1", model_path("f", "r1"), "ab" * 32, 1, 1.0)
    stages = (Stage(1, percent, 0.0),)
    plan = Plan(family="f", seq=1, stable=one, canary=one, salt=salt, stages=stages)
    return {n for n in range(devices) if len(arms_for(plan, f"device-{n}", {})) > 1}


@given(st.text(max_size=40), st.lists(st.floats(0, 100), min_size=2, max_size=4))
def test_c1_up_only_adds_and_down_only_removes(salt: str, percents: list[float]) -> None:
    reached = [trying(salt, percent, 3000) for percent in sorted(percents)]
    assert all(below <= above for below, above in pairwise(reached))
    assert trying(salt, 0, 3000) == set()
    assert len(trying(salt, 100, 3000)) == 3000


def test_c1_a_percentage_is_that_of_the_devices() -> None:
    for percent in (1, 10, 50):
        assert abs(len(trying("salt", percent, 20_000)) / 200 - percent) < 1


def test_c1_the_bucket_is_the_same_anywhere() -> None:
    vectors = json.loads(VECTORS.read_text())["vectors"]
    assert len(vectors) > 20
    for each in vectors:
        assert bucket(each["salt"], each["device"]) == each["bucket"]
        digest = hashlib.sha256(f"{each['salt']}|{each['device']}".encode()).digest()
        assert each["bucket"] == (int.from_bytes(digest[:8], "big") >> 11) / 2**53


# C7: who slept through the stages lands on the current decision.


@pytest.mark.parametrize("promoted", [True, False])
@pytest.mark.parametrize("step_max", [100.0, 50.0])
def test_c7_a_device_that_slept_lands_on_the_decision(
    play: Callable[..., None], step_max: float, promoted: bool
) -> None:
    async def stage(scene: Scene) -> None:
        device = scene.device("d1", step_max)
        await scene.publish(scene.plan(1, 1), 1)
        assert await device.look() == ["r1"]
        steps = [1.0, 10.0, 50.0, 100.0]
        for at in range(4):
            await scene.publish(scene.plan(2 + at, 1, 2, *steps[: at + 1]), 2 * (at == 0))
        if promoted:
            await scene.publish(scene.plan(6, 2, 0, *steps))
            await scene.publish(scene.plan(7, 2, 3, fallback=scene.arm(1)), 3)
            await scene.publish(scene.plan(8, 2, 0, *steps))
        else:
            await scene.publish(scene.plan(6, 1))
        assert await device.look() == ["r2" if promoted else "r1"]
        assert device.count("applied") == 2
        there = [device.runtime.shelf.path_of(scene.file(n).sha256) is not None for n in (2, 3)]
        assert there == [promoted, False]

    play(stage)


def test_c7_a_device_that_slept_lands_in_the_stage_of_now(play: Callable[..., None]) -> None:
    async def stage(scene: Scene) -> None:
        device = scene.device(step_max=50)
        await scene.publish(scene.plan(1, 1), 1)
        assert await device.look() == ["r1"]
        for at, steps in enumerate([(1,), (1, 50), (1, 50, 100)]):
            await scene.publish(scene.plan(2 + at, 1, 2, *steps), 2 * (at == 0))
        assert await device.look() == ["r1", "r2"]

    play(stage)


def test_a_fallback_that_was_banned_after_the_plan_keeps_nobody_from_it(
    play: Callable[..., None],
) -> None:
    async def stage(scene: Scene) -> None:
        device = scene.device()
        await scene.publish(scene.plan(1, 1), 1)
        await scene.publish(scene.plan(2, 2, fallback=scene.arm(1)), 2)
        assert await device.look() == ["r2"]
        assert device.runtime.current("toy").fallback == scene.arm(1)
        await scene.publisher.raise_floor("toy", 2)
        assert await device.look() == ["r2"]
        assert device.runtime.current("toy").fallback is None
        assert device.runtime.shelf.load_current("toy").fallback is None
        await scene.publish(scene.plan(3, 2, 3, fallback=scene.arm(1)), 3)
        assert await device.look() == ["r2", "r3"]
        assert not [name for name in device.agent.statistics() if name.startswith("refused")]

    play(stage)


# C8: a window that is closed, a hold: no device changes.


@pytest.mark.parametrize("new", [(2, 0), (1, 2)])
@pytest.mark.parametrize("by", ["window", "plan", "configuration"])
def test_c8_while_it_must_wait_no_device_changes(
    play: Callable[..., None], new: tuple[int, int], by: str
) -> None:
    async def stage(scene: Scene) -> None:
        device = scene.device(hold=by == "configuration")
        await scene.publish(scene.plan(1, 1), 1)
        assert await device.look() == ["r1"]
        more = {"window": {"window": Window(600, 660)}, "plan": {"hold": (LATE,)}}.get(by, {})
        await scene.publish(scene.plan(2, *new, 100, **more), 2)
        for _ in range(3):
            assert await device.look() == ["r1"]
            scene.clock.advance(1800)
        assert device.count("applied") == 1
        assert device.runtime.report({}).plan_seq == 1
        assert device.count("waiting_window" if by == "window" else "waiting_hold") == 1
        assert device.runtime.shelf.path_of(scene.file(2).sha256) is None
        scene.clock.advance(1800)
        after = await device.look()
        assert after == ([f"r{each}" for each in new if each] if by == "window" else ["r1"])

    play(stage)


def test_c8_what_is_rolled_back_before_the_window_opens_is_never_installed(
    play: Callable[..., None],
) -> None:
    async def stage(scene: Scene) -> None:
        device = scene.device()
        night = {"window": Window(600, 660)}
        await scene.publish(scene.plan(1, 1), 1)
        await scene.publish(scene.plan(2, 1, 2, 100, **night), 2)
        assert await device.look() == ["r1", "r2"], "who runs nothing yet does not wait"
        await scene.publish(scene.plan(3, 1, 0, **night))
        assert await device.look() == ["r1"], "and nobody waits to leave"

    play(stage)


# C9: from 1 to 100 by a bug: refused without the gate.


def test_c9_a_jump_is_refused_and_taken_once_the_gate_has_approved_it(
    play: Callable[..., None],
) -> None:
    async def stage(scene: Scene) -> None:
        careful, trusting = scene.device(step_max=25), scene.device(f"{LATE}0", step_max=100)
        await scene.begun(careful)
        jump = await scene.publish(scene.plan(3, 1, 2, 1, 100))
        assert await trusting.look() == ["r1", "r2"]
        assert await careful.look() == ["r1"]
        assert careful.count("refused_unapproved_jump") == 1
        await scene.publish(jump, approval=scene.approve(jump, scene.consent(2)))
        assert await careful.look() == ["r1", "r2"]
        await scene.publish(jump)
        assert await careful.look() == ["r1", "r2"]
        straight = msgspec.structs.replace(scene.plan(4, 3, fallback=scene.arm(2)), salt="")
        await scene.publish(straight, 3)
        assert await careful.look() == ["r1", "r2"], "no history is a jump from 0 to 100"
        await scene.publish(straight, approval=scene.approve(straight, scene.consent(3)))
        assert await careful.look() == ["r3"]

    play(stage)


def test_c9_small_steps_need_nobody_and_going_back_does_not_either(
    play: Callable[..., None],
) -> None:
    async def stage(scene: Scene) -> None:
        device, steps = scene.device(step_max=50), (1, 50, 100)
        await scene.begun(device)
        await scene.publish(scene.plan(4, 1, 2, *steps))
        assert await device.look() == ["r1", "r2"]
        await scene.publish(scene.plan(5, 2, 0, *steps, fallback=scene.arm(1)))
        assert await device.look() == ["r2"]
        await scene.publish(scene.plan(6, 1))
        assert await device.look() == ["r1"]

    play(stage)


def test_c9_a_thief_of_the_rollout_key_forges_no_approval(play: Callable[..., None]) -> None:
    async def stage(scene: Scene) -> None:
        device = scene.device(step_max=25)
        await scene.begun(device)
        jump, other = scene.plan(3, 1, 2, 1, 100), scene.plan(4, 1, 2, 1, 100)
        order = scene.consent(2)
        of_other = scene.approve(other, order)
        forged = [
            *(scene.approve(jump, order, by) for by in ("rollout", "learner", "time")),
            of_other,
            Approval(of_other.keyid, "ab" * 64),
            Approval(of_other.keyid, "no hex"),
            Approval("", ""),
        ]
        for approval in forged:
            with pytest.raises(TrustError, match="bad_approval"):
                await scene.publish(jump, approval=approval)
            await scene.steal(jump, approval)
            assert await device.look() == ["r1"]
        assert device.count("refused_unapproved_jump") == len(forged)
        await scene.publish(other, approval=of_other)
        assert await device.look() == ["r1", "r2"]

    play(stage)


@pytest.mark.parametrize("step_max", [25.0, 100.0])
def test_c9_a_history_that_is_not_what_the_device_saw_is_refused(
    play: Callable[..., None], step_max: float
) -> None:
    async def stage(scene: Scene) -> None:
        device = scene.device(step_max=step_max)
        await scene.begun(device)
        steps = scene.plan(9, 1, 2, 20, 40, 60, 80, 100)
        for lie in (
            steps,
            msgspec.structs.replace(steps, salt="another trial"),
            msgspec.structs.replace(steps, stages=()),
            msgspec.structs.replace(steps, canary=None, stable=scene.arm(2)),
        ):
            await scene.steal(lie)
            assert await device.look() == ["r1"]
            approved = scene.approve(lie, scene.consent(2))
            await scene.steal(lie, approved)
            assert await device.look() == ["r1"]
        assert device.count("refused_history_rewritten") == 8
        new = [Stage(2 + n, 20.0 * n, NOW_S) for n in range(1, 6)]
        fresh = msgspec.structs.replace(steps, salt="t", stages=tuple(new))
        await scene.publish(fresh)
        assert await device.look() == ["r1", "r2"]

    play(stage)


def test_c9_pins_are_no_way_around_it(play: Callable[..., None]) -> None:
    async def stage(scene: Scene) -> None:
        device = scene.device(step_max=25)
        await scene.begun(device)
        await scene.publish(scene.plan(3, 1, 2, 1, pins={LATE: "r2"}))
        assert await device.look() == ["r1"]
        assert device.count("refused_unapproved_jump") == 1

    play(stage)


def test_c9_in_a_home_without_the_role_nothing_jumps(play: Callable[..., None]) -> None:
    async def stage(scene: Scene) -> None:
        scene.be_old()
        device = scene.device(step_max=25)
        await scene.begun(device)
        jump = scene.plan(3, 1, 2, 1, 100)
        with pytest.raises(TrustError, match="bad_approval"):
            await scene.publish(jump, approval=scene.approve(jump, scene.consent(2)))
        await scene.publish(jump)
        assert await device.look() == ["r1"]

    play(stage)


def test_c9_the_gate_approves_what_a_known_operator_names_and_it_has_passed(
    play: Callable[..., None],
) -> None:
    async def stage(scene: Scene) -> None:
        jump = scene.plan(3, 1, 2, 1, 100)
        several = msgspec.structs.replace(jump, others=(scene.arm(3),))
        good = scene.consent(2)
        refused = [
            (jump, scene.consent(1), "not_approved"),
            (jump, scene.consent(2, percent=99), "not_approved"),
            (jump, scene.consent(2, family="other"), "not_approved"),
            (several, good, "not_approved"),
            (scene.plan(3, 2), scene.consent(2, percent=50), "not_approved"),
            (jump, msgspec.structs.replace(good, operator="nobody"), "unknown_operator"),
            (jump, msgspec.structs.replace(good, text=good.text + b" "), "bad_order_signature"),
        ]
        for plan, order, code in refused:
            with pytest.raises(RequestError) as caught:
                scene.approve(plan, order)
            assert caught.value.code == code
        wish = orders.Wish(family="toy", packages=[scene.file(2).sha256])
        pushed = orders.signed(wish, "op", scene.folder / "op.pem")
        with pytest.raises(RequestError, match="bad_order_signature"):
            scene.approve(jump, pushed)
        scene.approve(several, scene.consent(2, 3))
        scene.passed.discard(scene.arm(2).sha256)
        with pytest.raises(RequestError, match="not passed r2"):
            approvals.approve(
                encode_plan(jump),
                good,
                scene.home / "keys" / "operators",
                lambda _sha256: False,
                keys.load_signer(scene.home, "gate"),
            )

    play(stage)
