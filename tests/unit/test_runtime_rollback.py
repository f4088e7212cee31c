"""Rolling back: to what served before, at once, without a network, and for good."""

from __future__ import annotations

import asyncio
import os

import msgspec
import pytest

from edge_runtime import factory
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import CapacityError, PackageError, RequestError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.plan import Plan, PlanArm, Variant, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.shelf import Shelf

NOW_S = 1_360_000_000.0
MORE_FEATURES = """
version = 1
[[features]]
name = "seen"
window = { over = "departed", statistic = "count", span_s = 3600.0 }
"""
FEWER_FEATURES = """
version = 1
[[features]]
name = "distance"
field = "distance"
"""


@pytest.fixture
def config(tmp_path):
    return EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        attributes={"site": "a"},
    )


@pytest.fixture
def put(config, write_package):
    """`put(bias, ...)` lays a package on the shelf and gives the arm of a plan that names it."""

    def put(bias, weight=1.0, **options):
        path, sha256 = write_package(bias=bias, **options)
        Shelf(config.state_dir / "shelf").put_whole(sha256, path.read_bytes())
        release = f"r{bias:g}"
        return PlanArm(release, model_path("toy", release), sha256, 1, weight)

    return put


@pytest.fixture
def follow(config):
    """`follow(stable, canary)` makes a plan of these the current one on the shelf."""
    plans = []

    def follow(stable, canary=None, **options):
        plan = Plan(
            family="toy", seq=len(plans) + 1, stable=stable, canary=canary, salt="s", **options
        )
        plans.append(plan)
        Shelf(config.state_dir / "shelf").save_current(plan)
        return plan

    return follow


def opened(config):
    return Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1)


def asked(runtime):
    event = Event("scheduled", NOW_S, {"carrier": "UA", "distance": 1.0})
    return runtime.predict("toy", event)


def rolled_back(runtime):
    return runtime.rollback("toy", "it was wrong")


def rolled_back_async(runtime):
    return asyncio.run(runtime.rollback_async("toy", "it was wrong"))


def code(call, *arguments):
    with pytest.raises((RequestError, PackageError, CapacityError)) as caught:
        call(*arguments)
    return caught.value.code


def serving(runtime):
    """What answers, and what stands behind it."""
    arms = runtime._members["toy"].pipeline.slot.arms
    return runtime.model("toy").releases, runtime.current("toy"), arms


@pytest.mark.parametrize("roll_back", [rolled_back, rolled_back_async])
def test_it_goes_to_the_release_before_and_stays_there(config, put, follow, roll_back):
    first, second = put(0.0), put(1.0)
    follow(first)
    follow(second)
    with opened(config) as runtime:
        assert asked(runtime).release == "r1"
        assert roll_back(runtime) == "r0"
        assert (asked(runtime).release, runtime.model("toy").releases) == ("r0", ("r0",))
        assert runtime.shelf.quarantined() == {second.sha256: "rolled_back"}
        assert runtime.current("toy").stable == first
        before = serving(runtime)
        assert code(roll_back, runtime) == "nothing_to_roll_back"
        assert serving(runtime) == before
    with opened(config) as runtime:
        assert asked(runtime).release == "r0"
        assert runtime.shelf.quarantined() == {second.sha256: "rolled_back"}


def test_a_canary_is_left_first_and_the_stable_release_goes_on_alone(config, put, follow):
    first, second, third = put(0.0), put(1.0, 0.7), put(2.0, 0.3)
    follow(first)
    follow(second, third)
    with opened(config) as runtime:
        assert runtime.model("toy").releases == ("r1", "r2")
        assert rolled_back(runtime) == "r1"
        assert {asked(runtime).release for _ in range(30)} == {"r1"}
        assert set(runtime.shelf.quarantined()) == {third.sha256}
    with opened(config) as runtime:
        assert runtime.model("toy").releases == ("r1",)
        assert rolled_back(runtime) == "r0"
        assert asked(runtime).release == "r0"


def test_a_device_that_does_not_try_the_canary_leaves_what_it_runs(config, put, follow):
    first, second, third = put(0.0), put(1.0, 0.7), put(2.0, 0.3)
    follow(first)
    follow(second, third, selector={"site": "elsewhere"})
    with opened(config) as runtime:
        assert runtime.model("toy").releases == ("r1",)
        assert rolled_back(runtime) == "r0"
        assert set(runtime.shelf.quarantined()) == {second.sha256}


def test_every_variant_of_what_is_left_is_left(config, put, follow, write_package):
    first, second = put(0.0), put(1.0)
    other = put(1.0, ballast=3)
    names = ("fp32", second.sha256), ("int8", other.sha256)
    paths = second.path, model_path("toy", "r1", "int8")
    variants = tuple(Variant(n, p, s) for (n, s), p in zip(names, paths, strict=True))
    follow(first)
    follow(msgspec.structs.replace(second, variants=variants))
    with opened(config) as runtime:
        assert rolled_back(runtime) == "r0"
        assert set(runtime.shelf.quarantined()) == {second.sha256, other.sha256}


def test_before_any_release_there_is_nothing_to_roll_back(config, put, follow):
    with opened(config) as runtime:
        assert code(rolled_back, runtime) == "nothing_to_roll_back"
    follow(put(0.0))
    with opened(config) as runtime:
        assert code(rolled_back, runtime) == "nothing_to_roll_back"
        assert runtime.shelf.quarantined() == {}
        with pytest.raises(RequestError, match="unknown_family"):
            runtime.rollback("other", "no such")


def test_a_factory_package_can_be_left_too(config, write_package):
    for bias in (0.0, 1.0):
        path, _ = write_package(bias=bias)
        release = factory.install(config, path, factory.inspect(path))
    with opened(config) as runtime:
        assert asked(runtime).release == release
        assert rolled_back(runtime) != release


@pytest.mark.parametrize("roll_back", [rolled_back, rolled_back_async])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_where_the_release_before_does_not_load_nothing_changes(
    config, put, follow, roll_back, damage
):
    first, second = put(0.0), put(1.0)
    follow(first)
    follow(second)
    path = config.state_dir / "shelf" / "packages" / f"{first.sha256}.onnx"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with opened(config) as runtime:
        before = serving(runtime)
        assert code(roll_back, runtime) == "not_on_shelf"
        assert serving(runtime) == before
        assert second.sha256 not in runtime.shelf.quarantined()
        assert asked(runtime).release == "r1"
    with opened(config) as runtime:
        assert asked(runtime).release == "r1"


@pytest.mark.parametrize("roll_back", [rolled_back, rolled_back_async])
@pytest.mark.parametrize("state", ["quarantine.json", "current/toy.json"])
def test_where_the_shelf_cannot_be_written_what_serves_is_unchanged(
    config, put, follow, roll_back, state
):
    follow(put(0.0))
    follow(put(1.0))
    path = config.state_dir / "shelf" / state
    in_the_way = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with opened(config) as runtime:
        in_the_way.mkdir()
        before = serving(runtime)
        assert code(roll_back, runtime) == "shelf_unwritable"
        assert serving(runtime) == before
        in_the_way.rmdir()
        assert roll_back(runtime) == "r0"


def test_a_crash_between_quarantine_and_plan_restarts_on_the_release_before(config, put, follow):
    first, second = put(0.0), put(1.0)
    follow(first)
    follow(second)
    Shelf(config.state_dir / "shelf").quarantine(second.sha256, "rolled_back")
    with opened(config) as runtime:
        assert asked(runtime).release == "r0"


@pytest.mark.parametrize("roll_back", [rolled_back, rolled_back_async])
def test_windows_that_only_the_release_before_had_are_rebuilt(config, put, follow, roll_back):
    follow(put(0.0, spec=Spec.from_toml(MORE_FEATURES)))
    follow(put(1.0, spec=Spec.from_toml(FEWER_FEATURES)))
    with opened(config) as runtime:
        for step in range(40):
            fields = {"carrier": "UA", "delay": 1.0}
            runtime.observe("toy", Event("departed", NOW_S - 100 + step, fields))
        assert roll_back(runtime) == "r0"
        [engine] = runtime._members["toy"].pipeline.engines.values()
        assert engine.vector(NOW_S, {}).tolist() == [40.0]


def brought(runtime, config, arm, seq):
    """Let `arm` serve as a plan that is not settled yet: the shelf still calls another current."""
    path = config.state_dir / "shelf" / "packages" / f"{arm.sha256}.onnx"
    plan = Plan(family="toy", seq=seq, stable=arm, salt="s")
    runtime.swap("toy", [load_arm(path, arm.sha256, "stable", arm.release, 1.0)], plan)


@pytest.mark.parametrize("roll_back", [rolled_back, rolled_back_async])
def test_before_the_plan_is_settled_it_goes_to_what_served_until_then(
    config, put, follow, roll_back
):
    first, second, third = put(0.0), put(1.0), put(2.0)
    follow(first)
    follow(second)
    with opened(config) as runtime:
        brought(runtime, config, third, 3)
        assert asked(runtime).release == "r2"
        assert roll_back(runtime) == "r1"
        assert asked(runtime).release == "r1"
        assert runtime.shelf.quarantined() == {third.sha256: "rolled_back"}
        assert roll_back(runtime) == "r0"
    with opened(config) as runtime:
        assert asked(runtime).release == "r0"


@pytest.mark.parametrize("roll_back", [rolled_back, rolled_back_async])
def test_the_first_plan_that_is_not_settled_is_left_for_the_one_on_the_shelf(
    config, put, follow, roll_back
):
    first, second = put(0.0), put(1.0)
    follow(first)
    with opened(config) as runtime:
        brought(runtime, config, second, 2)
        assert roll_back(runtime) == "r0"
        assert code(roll_back, runtime) == "nothing_to_roll_back"


@pytest.mark.parametrize("roll_back", [rolled_back, rolled_back_async])
def test_what_is_in_quarantine_by_now_is_nothing_to_go_back_to(config, put, follow, roll_back):
    first, second = put(0.0), put(1.0)
    follow(first)
    follow(second)
    with opened(config) as runtime:
        runtime.shelf.quarantine(first.sha256, "golden_mismatch")
        before = serving(runtime)
        assert code(roll_back, runtime) == "nothing_to_roll_back"
        assert serving(runtime) == before
        assert set(runtime.shelf.quarantined()) == {first.sha256}


def test_of_two_before_it_the_one_that_is_still_good_is_gone_back_to(config, put, follow):
    first, second, third = put(0.0), put(1.0), put(2.0)
    follow(first)
    follow(second)
    with opened(config) as runtime:
        brought(runtime, config, third, 3)
        runtime.shelf.quarantine(second.sha256, "golden_mismatch")
        assert rolled_back(runtime) == "r0"
        assert asked(runtime).release == "r0"


def test_requests_go_on_while_it_rolls_back(config, put, follow):
    follow(put(0.0))
    follow(put(1.0))

    async def beside_requests(runtime):
        rolling = asyncio.create_task(runtime.rollback_async("toy", "bad"))
        releases = []
        while not rolling.done():
            releases.append(asked(runtime).release)
            await asyncio.sleep(0)
        return await rolling, [*releases, asked(runtime).release]

    with opened(config) as runtime:
        release, releases = asyncio.run(beside_requests(runtime))
        assert (release, releases[0], releases[-1]) == ("r0", "r1", "r0")
        assert releases == sorted(releases, reverse=True)
        assert runtime.counters()["requests_dropped"] == 0


def test_a_file_that_is_served_by_itself_has_nothing_before_it(write_package):
    path, _ = write_package()
    with Runtime.open(package=path, clock=ManualClock(NOW_S)) as runtime:
        assert code(rolled_back, runtime) == "nothing_to_roll_back"
        assert asked(runtime).release == "local"
