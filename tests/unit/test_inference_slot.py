"""Loading a package and swapping it in: what is proven first, and that nobody notices."""

from __future__ import annotations

import ctypes
import threading
import weakref
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.errors import PackageError
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import Slot, load_arm, unchanged

X = np.zeros((1, 5), dtype=np.float32)


def refused(path, sha256=None):
    with pytest.raises(PackageError) as caught:
        load_arm(path, sha256, "stable", "r1", 1.0)
    return caught.value


def test_a_sound_package_loads_and_answers(write_package):
    path, sha256 = write_package(bias=0.0)
    arm = load_arm(path, sha256, "stable", "r1", 0.7)
    assert (arm.name, arm.release, arm.weight, arm.info.family) == ("stable", "r1", 0.7, "toy")
    assert arm.runner.run(X).tolist() == [[0.5]]
    assert arm.info.provenance == {"bias": 0.0}


def test_a_package_with_another_hash_is_refused_before_it_is_loaded(write_package, tmp_path):
    path, sha256 = write_package()
    path.write_bytes(path.read_bytes() + b"\0")
    assert refused(path, sha256).code == "hash_mismatch"
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no model at all")
    assert refused(garbage, sha256).code == "hash_mismatch"


def test_a_package_that_answers_otherwise_than_where_it_was_made_is_refused(write_package):
    assert refused(write_package(model_bias=0.0001)[0]).code == "golden_mismatch"


def test_a_model_that_answers_nan_is_refused(write_package):
    assert refused(write_package(model_bias=float("nan"))[0]).code == "golden_mismatch"


@pytest.mark.parametrize("key", ["family", "interface", "features", "golden", "provenance"])
def test_a_package_without_one_of_its_keys_is_refused(write_package, key):
    assert refused(write_package(drop=f"headwater.{key}")[0]).code == "missing_metadata"


def test_a_model_of_another_width_than_its_features_is_refused(write_package):
    assert refused(write_package(columns=6)[0]).code == "wrong_signature"


@pytest.mark.parametrize("data", [b"", b"no model at all", None])
def test_a_file_that_is_no_model_is_refused(tmp_path, data):
    path = tmp_path / "x.onnx"
    if data is not None:
        path.write_bytes(data)
    assert refused(path).code == "unreadable_package"
    assert refused(path, "0" * 64).code == (
        "hash_mismatch" if data is not None else "unreadable_package"
    )


def test_a_row_of_the_wrong_width_is_our_error_and_the_runner_goes_on(write_package):
    runner = Runner(write_package()[0])
    with pytest.raises(PackageError) as caught:
        runner.run(np.zeros((1, 3), dtype=np.float32))
    assert caught.value.code == "run_failed"
    assert runner.run(X).tolist() == [[0.5]]


@pytest.fixture
def arms(write_package):
    def load(bias, name="stable", **options):
        return load_arm(*write_package(bias=bias, **options), name, f"r{bias:g}", 1.0)

    return load


def test_a_swap_that_is_refused_changes_nothing_and_is_counted(arms, toy_interface):
    slot, one = Slot("toy"), arms(0.0)
    slot.swap([one])
    other = msgspec.structs.replace(toy_interface, skew_s_max=1.0)
    with pytest.raises(PackageError) as caught:
        slot.swap([one, arms(1.0, "canary", interface=other)])
    assert caught.value.code == "bad_arms"
    with pytest.raises(PackageError) as caught:
        slot.swap([one, arms(1.0, "stable")])
    assert caught.value.code == "bad_arms"
    assert slot.arms == (one,)
    with pytest.raises(PackageError) as caught:
        Slot("another").swap([one])
    assert caught.value.code == "wrong_family"
    assert (slot.statistics()["swaps"], slot.statistics()["swap_failures"]) == (1, 2)


def test_arms_live_as_long_as_a_lease_on_them_and_no_longer(arms):
    slot = Slot("toy")
    slot.swap([arms(0.0)])
    gone = weakref.ref(slot.arms[0].runner)
    with slot.lease() as held:
        slot.swap([arms(1.0)])
        assert slot.statistics()["draining"] == 1
        assert held[0].runner.run(X).tolist() == [[0.5]]
        assert slot.arms[0].release == "r1"
        del held
    slot.close()
    assert gone() is None
    assert slot.statistics() == {"swaps": 3, "swap_failures": 0, "leases": 0, "draining": 0}


def test_swaps_under_load_drop_and_mix_nothing(arms):
    slot, generations = (
        Slot("toy"),
        [(arms(0.0), arms(0.1, "canary")), (arms(2.0), arms(2.1, "canary"))],
    )
    expected = {
        tuple(arm.release for arm in each): [arm.runner.run(X).tolist() for arm in each]
        for each in generations
    }
    slot.swap(generations[0])
    done, wrong, answered = threading.Event(), [], [0] * 3

    def ask(worker):
        try:
            while not done.is_set() or answered[worker] < 200:
                with slot.lease() as now:
                    releases = tuple(arm.release for arm in now)
                    answers = [arm.runner.run(X).tolist() for arm in now]
                if answers != expected[releases]:
                    wrong.append((releases, answers))
                answered[worker] += 1
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        slot.swap(generations[turn % 2])
    done.set()
    for thread in threads:
        thread.join()
    slot.close()
    assert wrong == []
    assert min(answered) >= 200
    assert slot.statistics() == {"swaps": 202, "swap_failures": 0, "leases": 0, "draining": 0}


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim") or not Path("/proc/self/statm").exists(),
    reason="memory is given back with a call of glibc, and read from /proc",
)
def test_memory_does_not_grow_from_swap_to_swap(write_package):
    path, _ = write_package(ballast=2000)  # 16 MB of weights
    slot, resident = Slot("toy"), []
    for turn in range(8):
        slot.swap([load_arm(path, None, "stable", f"r{turn}", 1.0)])
        slot.settle()
        resident.append(resident_mib())
    assert max(resident[1:]) < resident[0] + 8


def test_what_was_read_while_its_file_was_changed_is_refused(write_package, tmp_path):
    path, sha256 = write_package()
    genuine = path.read_bytes()
    with unchanged(path, sha256):
        assert path.read_bytes() == genuine

    def overwrite():
        path.write_bytes(genuine + b"\0")

    def replace():
        other = tmp_path / "other"
        other.write_bytes(genuine)
        other.replace(path)

    for change in (overwrite, replace):
        path.write_bytes(genuine)
        with pytest.raises(PackageError) as caught, unchanged(path, sha256):
            change()
        assert caught.value.code == "hash_mismatch"


def test_what_fails_because_its_file_was_changed_is_not_held_against_the_package(write_package):
    path, sha256 = write_package()

    def load():
        with unchanged(path, sha256):
            path.write_bytes(b"garbage")
            Runner(path)

    with pytest.raises(PackageError) as caught:
        load()
    assert caught.value.code == "hash_mismatch"
    assert caught.value.__context__.code == "unreadable_package"
