"""Variants: the fastest that is right here, and nothing of the others."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.errors import PackageError, TransportError
from edge_runtime.inference.slot import Arm, load_arm
from edge_runtime.inference.variants import fastest, is_faster

BALLAST = 700  # two megabytes of weights: ten times the time of none

WritePackage = Callable[..., tuple[Path, str]]


@pytest.fixture
def loads(write_package: WritePackage) -> Callable[..., Callable[[], Arm]]:
    """`loads(name, ...)` is the loading of a package made with `...`."""

    def make(name: str, **facts: float) -> Callable[[], Arm]:
        path, sha256 = write_package(**facts)
        return lambda: load_arm(path, sha256, "stable", "r1", 1.0, variant=name)

    return make


def test_the_fastest_is_kept_wherever_it_stands(loads: Callable[..., Callable[[], Arm]]) -> None:
    slow, fast = loads("slow", ballast=BALLAST), loads("fast")

    assert fastest([slow, fast]).variant == "fast"
    assert fastest([fast, slow]).variant == "fast"


@pytest.mark.parametrize(
    ("one_us", "other_us", "expected"),
    [(50.0, 100.0, True), (95.0, 100.0, False), (100.0, 100.0, False), (200.0, 100.0, False)],
)
def test_a_difference_within_the_noise_is_none(
    one_us: float, other_us: float, expected: bool
) -> None:
    assert is_faster(one_us, other_us) is expected


def test_a_package_that_could_not_be_timed_is_kept_only_without_another() -> None:
    assert is_faster(1e9, None)
    assert not is_faster(None, 1e9)
    assert not is_faster(None, None)


def test_what_is_not_kept_is_freed(loads: Callable[..., Callable[[], Arm]]) -> None:
    runners = []

    def watched(load: Callable[[], Arm]) -> Callable[[], Arm]:
        def loading() -> Arm:
            arm = load()
            runners.append(weakref.ref(arm.runner))
            return arm

        return loading

    slow, fast = loads("slow", ballast=BALLAST), loads("fast")
    kept = fastest([watched(load) for load in (slow, fast, slow)])

    assert [runner() is kept.runner for runner in runners] == [False, True, False]
    assert [runner() is None for runner in runners] == [True, False, True]


def test_a_wrong_package_is_passed_over_however_fast(
    loads: Callable[..., Callable[[], Arm]],
) -> None:
    wrong, slow = loads("wrong", model_bias=1.5), loads("slow", ballast=BALLAST)

    assert fastest([wrong, slow]).variant == "slow"


def test_where_none_is_right_the_first_ones_error_is_raised(
    loads: Callable[..., Callable[[], Arm]], tmp_path: Path
) -> None:
    def missing() -> Arm:
        return load_arm(tmp_path / "none.onnx", None, "stable", "r1", 1.0)

    with pytest.raises(PackageError) as caught:
        fastest([loads("wrong", model_bias=1.5), missing])
    assert caught.value.code == "golden_mismatch"


def test_other_errors_end_the_choice_at_once(loads: Callable[..., Callable[[], Arm]]) -> None:
    def unreachable() -> Arm:
        raise TransportError("unreachable", "away")

    with pytest.raises(TransportError):
        fastest([loads("right"), unreachable])
