"""Loading an arm of a plan: the same package after a restart, and never one that failed here."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edge_runtime.errors import HeadwaterError, PackageError, TransportError, TrustError
from edge_runtime.rollout.arms import load_plan_arm, packages_kept
from edge_runtime.rollout.plan import PlanArm, Variant, model_path
from edge_runtime.update.shelf import Shelf

WritePackage = Callable[..., tuple[Path, str]]
NAMES = ("int8", "float32")


@dataclass
class Store:
    """Where packages come from; remembers what was asked for."""

    shelf: Shelf
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def obtain(self, package: Variant) -> Path:
        self.asked.append(package.name)
        return self.shelf.put_whole(package.sha256, self.files[package.sha256])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Shelf(tmp_path / "shelf"))


@pytest.fixture
def release(store: Store, write_package: WritePackage) -> Callable[..., PlanArm]:
    """`release({...}, {...})` has an int8 and a float32 package made with these facts."""

    def make(*facts: dict[str, float]) -> PlanArm:
        found = []
        for name, each in zip(NAMES, facts, strict=False):
            path, sha256 = write_package(**each)
            store.files[sha256] = path.read_bytes()
            variant = name if found else ""
            found.append(Variant(name, model_path("toy", "r1", variant), sha256))
        variants = tuple(found) if len(found) > 1 else ()
        return PlanArm("r1", found[0].path, found[0].sha256, 1, 0.5, variants)

    return make


SLOW, FAST, WRONG, OTHER_WRONG = {"ballast": 700}, {}, {"model_bias": 1.5}, {"model_bias": 2.5}


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(HeadwaterError) as caught:
        call()
    return caught.value.code


def test_an_arm_of_one_package_is_that_package(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST)
    loaded = load_plan_arm(store.shelf, "canary", arm, store.obtain)
    found = (loaded.name, loaded.release, loaded.weight, loaded.variant, loaded.sha256)
    assert found == ("canary", "r1", 0.5, "", arm.sha256)
    assert packages_kept(store.shelf, arm) == {arm.sha256}


def test_a_restart_loads_what_was_chosen_and_nothing_else(
    store: Store, release: Callable[..., PlanArm], tmp_path: Path
) -> None:
    arm = release(SLOW, FAST)
    assert load_plan_arm(store.shelf, "stable", arm, store.obtain).variant == "float32"
    assert packages_kept(store.shelf, arm) == {arm.variants[1].sha256}
    store.shelf.prune(packages_kept(store.shelf, arm))

    reborn = Shelf(tmp_path / "shelf")

    assert load_plan_arm(reborn, "stable", arm).variant == "float32"
    assert reborn.quarantined() == {}


def test_what_is_in_memory_is_not_loaded_again_unless_it_was_given_up_or_left_the_shelf(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST)
    tried = load_plan_arm(store.shelf, "canary", arm, store.obtain)
    store.asked.clear()

    again = load_plan_arm(store.shelf, "stable", arm, store.obtain, resident=[tried])
    assert again.runner is tried.runner
    assert (again.name, store.asked) == ("stable", [])

    tried.runner.give_up()
    fresh = load_plan_arm(store.shelf, "stable", arm, store.obtain, resident=[tried])
    assert fresh.runner is not tried.runner
    store.shelf.prune(set())
    store.asked.clear()
    load_plan_arm(store.shelf, "stable", arm, store.obtain, resident=[fresh])
    assert store.asked == [""]


def test_what_was_chosen_is_loaded_though_another_would_be_faster_now(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST, SLOW)
    store.shelf.choose(arm.sha256, arm.variants[1].sha256)
    assert load_plan_arm(store.shelf, "stable", arm, store.obtain).variant == "float32"
    assert store.asked == ["float32"]


def test_a_package_that_fails_is_quarantined_and_the_other_serves(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(WRONG, SLOW)
    assert load_plan_arm(store.shelf, "stable", arm, store.obtain).variant == "float32"
    assert store.shelf.quarantined() == {arm.sha256: "golden_mismatch"}


def test_where_all_fail_the_first_error_is_raised_and_none_is_tried_again(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(WRONG, OTHER_WRONG)
    load = lambda: load_plan_arm(store.shelf, "stable", arm, store.obtain)  # noqa: E731
    assert code_of(load) == "golden_mismatch"
    assert set(store.shelf.quarantined()) == {each.sha256 for each in arm.variants}
    store.asked.clear()
    assert code_of(load) == "release_quarantined"
    assert store.asked == []


def test_a_chosen_package_that_was_quarantined_makes_room_for_the_other(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(SLOW, FAST)
    load_plan_arm(store.shelf, "stable", arm, store.obtain)
    store.shelf.quarantine(arm.variants[1].sha256, "run_failed")
    assert packages_kept(store.shelf, arm) == {each.sha256 for each in arm.variants}
    assert load_plan_arm(store.shelf, "stable", arm, store.obtain).variant == "int8"
    assert packages_kept(store.shelf, arm) == {arm.sha256}


def test_a_package_that_is_not_here_is_no_bad_package(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST, SLOW)
    assert code_of(lambda: load_plan_arm(store.shelf, "stable", arm)) == "not_on_shelf"
    assert store.shelf.quarantined() == {}


def test_a_network_that_fails_ends_the_attempt_and_blames_nothing(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST, SLOW)

    def broken(package: Variant) -> Path:
        if package.name == "float32":
            raise TransportError("unreachable", "away")
        return store.obtain(package)

    assert code_of(lambda: load_plan_arm(store.shelf, "stable", arm, broken)) == "unreachable"
    assert (store.shelf.quarantined(), store.shelf.chosen(arm.sha256)) == ({}, None)


def test_what_the_proof_refuses_is_never_loaded(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST, SLOW)

    def prove(path: Path) -> None:
        if path.stem == arm.sha256:
            raise PackageError("package_crashed", f"{path} ended the process that tried it")

    assert load_plan_arm(store.shelf, "stable", arm, store.obtain, prove).variant == "float32"
    assert store.shelf.quarantined() == {arm.sha256: "package_crashed"}


def test_an_arm_of_one_package_that_was_left_is_refused(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST)
    store.shelf.quarantine(arm.sha256, "rolled_back")
    with pytest.raises(TrustError, match="release_quarantined"):
        load_plan_arm(store.shelf, "stable", arm, store.obtain)


def test_a_disk_that_damages_a_package_does_not_speak_against_it(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST)

    def prove(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])
        raise PackageError("unreadable_package", f"{path} is cut")

    with pytest.raises(PackageError, match="unreadable_package"):
        load_plan_arm(store.shelf, "stable", arm, store.obtain, prove)
    assert store.shelf.quarantined() == {}
    assert load_plan_arm(store.shelf, "stable", arm, store.obtain).release == "r1"


@pytest.mark.parametrize("left", range(4))
def test_a_process_without_file_handles_blames_no_package(
    store: Store, release: Callable[..., PlanArm], left: int
) -> None:
    arm = release(FAST)
    path = store.obtain(arm.packages[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, hard))
    try:
        with contextlib.suppress(PackageError):
            load_plan_arm(store.shelf, "stable", arm, lambda _: path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.shelf.quarantined() == {}
    assert load_plan_arm(store.shelf, "stable", arm, store.obtain).release == "r1"


def test_a_package_that_was_damaged_since_it_was_proven_is_fetched_again(
    store: Store, release: Callable[..., PlanArm]
) -> None:
    arm = release(FAST)
    path = store.obtain(arm.packages[0])
    path.write_bytes(path.read_bytes() + b"?")
    obtain = store.obtain
    assert code_of(lambda: load_plan_arm(store.shelf, "stable", arm, obtain)) == "hash_mismatch"
    assert load_plan_arm(store.shelf, "stable", arm, obtain).release == "r1"
