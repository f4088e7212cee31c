"""The floor and the rules: what is refused, by which name, and that a floor only rises."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import TrustError
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.update.trust import (
    CHUNK_BYTES,
    SKEW_S,
    TIME_KEPT_S,
    Floor,
    check_issued,
    check_plan,
    check_release,
    check_versions,
    chunk_sizes,
    confirmed,
    decode_floor,
    encode_floor,
    is_behind,
    lowest_time_s,
    merge_floors,
    planned,
    seen,
)

FLOOR = Floor(
    versions={"root": 1, "timestamp": 9, "snapshot": 8, "targets": 2, "plans": 5},
    plan_seq={"f": 4},
    release_counter={"f": 3},
    time_s=1000.0,
    online="k",
)
names = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=4)
numbers = st.dictionaries(names, st.integers(0, 100), max_size=4)
floors = st.builds(
    Floor,
    versions=numbers,
    plan_seq=numbers,
    release_counter=numbers,
    time_s=st.floats(0, 1e10),
)


def plan(seq: int = 4, family: str = "f", path: str | None = None) -> Plan:
    arm = PlanArm("r", path or model_path(family, "r"), "ab" * 32, 3, 1.0)
    return Plan(family=family, seq=seq, stable=arm)


def code_of(data: bytes) -> str:
    """The code with which a floor is refused; empty when it is read."""
    try:
        decode_floor(data)
    except TrustError as error:
        return error.code
    return ""


@given(floors)
def test_a_floor_survives_its_bytes(floor: Floor) -> None:
    assert decode_floor(encode_floor(floor)) == floor


@given(st.data())
def test_a_floor_with_any_flipped_bit_is_unreadable_or_the_same(data: st.DataObject) -> None:
    sealed = bytearray(encode_floor(FLOOR))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert code_of(bytes(sealed)) == "floor_unreadable" or decode_floor(bytes(sealed)) == FLOOR


@pytest.mark.parametrize("data", [b"", b"{}", encode_floor(FLOOR)[:-1]])
def test_half_a_floor_is_unreadable(data: bytes) -> None:
    with pytest.raises(TrustError, match="floor_unreadable"):
        decode_floor(data)


def test_a_floor_of_another_version_is_unreadable() -> None:
    with pytest.raises(TrustError, match="floor_unreadable"):
        decode_floor(encode_floor(msgspec.structs.replace(FLOOR, version=2)))


@given(floors, floors)
def test_merging_takes_the_higher_of_every_part(one: Floor, other: Floor) -> None:
    both = merge_floors(one, other)
    assert both == merge_floors(other, one)
    assert merge_floors(both, one) == both


@given(floors, st.integers(1, 50), st.integers(0, 50), st.floats(0, 1e10))
def test_confirming_under_the_same_keys_never_lowers_plan_counter_or_time(
    floor: Floor, seq: int, counter: int, issued_s: float
) -> None:
    under = confirmed(floor, {"root": 1}, floor.online, issued_s)
    after = planned(under, plan(seq), counter)
    assert after.plan_seq.get("f", 0) >= max(seq, floor.plan_seq.get("f", 0))
    assert after.release_counter.get("f", 0) >= max(counter, floor.release_counter.get("f", 0))
    assert after.time_s >= floor.time_s


def test_what_was_confirmed_passes_again_and_what_is_older_does_not() -> None:
    check_versions(FLOOR, FLOOR.versions, "k")
    check_versions(FLOOR, FLOOR.versions | {"plans": 6, "m-new": 1}, "k")
    for role in ("root", "timestamp", "snapshot", "targets", "plans"):
        older = FLOOR.versions | {role: FLOOR.versions[role] - 1}
        with pytest.raises(TrustError, match="metadata_rolled_back"):
            check_versions(FLOOR, older, "k")


def test_a_role_may_not_vanish() -> None:
    vanished = {role: version for role, version in FLOOR.versions.items() if role != "plans"}
    with pytest.raises(TrustError, match="metadata_rolled_back"):
        check_versions(FLOOR, vanished, "k")


RECOVERED = {"root": 2, "timestamp": 1, "snapshot": 1, "targets": 1, "plans": 1}


def test_new_online_keys_undo_the_versions_that_the_old_ones_vouched_for() -> None:
    check_versions(FLOOR, RECOVERED, "new")
    after = confirmed(FLOOR, RECOVERED, "new", 0.0)
    assert (after.versions, after.plan_seq, after.release_counter) == (RECOVERED, {}, {})
    assert (after.time_s, after.online) == (FLOOR.time_s, "new")
    assert merge_floors(FLOOR, after) == merge_floors(after, FLOOR) == after
    with pytest.raises(TrustError, match="metadata_rolled_back"):
        check_versions(after, RECOVERED | {"root": 1}, "k")


def test_a_newer_root_with_the_same_online_keys_undoes_nothing() -> None:
    for role in ("timestamp", "snapshot", "targets", "plans"):
        with pytest.raises(TrustError, match="metadata_rolled_back"):
            check_versions(FLOOR, FLOOR.versions | {"root": 2, role: 1}, "k")


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (plan(seq=3), "plan_rolled_back"),
        (plan(family="g"), "plan_of_other_family"),
        (plan(path=model_path("g", "r")), "plan_of_other_family"),
        (plan(path=model_path("f", "other")), "plan_of_other_family"),
        (plan(path="m/f/../g/r.onnx"), "plan_of_other_family"),
    ],
)
def test_a_plan_is_refused_by_name(bad: Plan, code: str) -> None:
    with pytest.raises(TrustError, match=code):
        check_plan(FLOOR, "f", bad)


def test_the_confirmed_plan_and_newer_ones_pass() -> None:
    check_plan(FLOOR, "f", plan(seq=4))
    check_plan(FLOOR, "f", plan(seq=5))
    check_plan(FLOOR, "g", plan(seq=1, family="g"))


def test_a_release_is_refused_below_either_floor_and_in_quarantine() -> None:
    check_release(FLOOR, "f", 3)
    check_release(FLOOR, "g", 0)
    with pytest.raises(TrustError, match="release_below_floor"):
        check_release(FLOOR, "f", 2)
    with pytest.raises(TrustError, match="release_below_floor"):
        check_release(FLOOR, "f", 3, release_floor=4)
    with pytest.raises(TrustError, match="release_quarantined"):
        check_release(FLOOR, "f", 3, quarantined=True)


def test_it_is_never_earlier_than_what_was_signed() -> None:
    assert lowest_time_s(FLOOR, 0.0) == 1000.0
    assert lowest_time_s(FLOOR, 3000.0) == 3000.0
    assert is_behind(3000.0 - SKEW_S - 1, 3000.0)
    assert not is_behind(3000.0 - SKEW_S, 3000.0)


def test_a_signed_time_is_stored_only_when_it_rose_by_much() -> None:
    assert seen(FLOOR, FLOOR.time_s + TIME_KEPT_S - 1) is FLOOR
    assert seen(FLOOR, 0.0) is FLOOR
    later = seen(FLOOR, FLOOR.time_s + TIME_KEPT_S)
    assert later == msgspec.structs.replace(FLOOR, time_s=FLOOR.time_s + TIME_KEPT_S)


def test_metadata_from_the_future_is_refused() -> None:
    check_issued(1000.0, 1000.0 - SKEW_S)
    with pytest.raises(TrustError, match="issued_ahead"):
        check_issued(1000.0, 999.0 - SKEW_S)


@given(st.integers(0, 5 * CHUNK_BYTES))
def test_chunks_cover_a_file_exactly(length: int) -> None:
    sizes = chunk_sizes(length)
    assert sum(sizes) == length
    assert all(0 < size <= CHUNK_BYTES for size in sizes) or sizes == [0]
    assert all(size == CHUNK_BYTES for size in sizes[:-1])
