"""The store of sessions: few, small, and gone when nobody comes back."""

from __future__ import annotations

import zlib
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.errors import CapacityError, PackageError, RequestError
from edge_runtime.personal import snapshot
from edge_runtime.personal.ground import Ground
from edge_runtime.personal.prior import Prior
from edge_runtime.personal.sessions import Sessions

WIDTH = 4
FAMILY = "shop"


def prior_of(region: float = 2.0) -> Prior:
    eye = np.eye(WIDTH + 1, dtype=np.float32)
    return Prior("binary", np.zeros(WIDTH + 1, np.float32), eye, region, norm_max=10.0)


def ground_of(region: float = 2.0) -> Ground:
    return Ground(prior_of(region), "spec", WIDTH, embed)


def store(clock: ManualClock | None = None, **bounds) -> Sessions:
    given = {"ttl_s": 60.0, "bytes_max": 1 << 20, "count_max": 100, **bounds}
    return Sessions(clock or ManualClock(1000.0), **given)


def row(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, WIDTH).astype(np.float32)


def embed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows, np.full(len(rows), 0.5, np.float32)


def taught(sessions: Sessions, key: str, ground: Ground, labels: int = 3) -> None:
    head = sessions.open((FAMILY, key), ground)
    for number in range(labels):
        head.adapt(row(number), 0.5, float(number % 2), row(number))


def moved(sessions: Sessions, name: tuple[str, str], ground: Ground, meanwhile=lambda: None):
    move = sessions.begin(name, ground, replace(ground.prior))
    if move is not None:
        move.learn(ground.embed)
        meanwhile()
        sessions.arrive(name, ground, move)


def test_a_session_opens_by_itself_and_is_found_again():
    sessions, ground = store(), ground_of()

    assert sessions.find((FAMILY, "ada"), ground) is None
    head = sessions.open((FAMILY, "ada"), ground)
    assert sessions.open((FAMILY, "ada"), ground) is head
    assert sessions.find((FAMILY, "ada"), ground) is head
    assert sessions.find(("other", "ada"), ground) is None
    assert sessions.statistics()["opened"] == 1


def test_unused_it_ends_and_used_it_lasts():
    clock = ManualClock()
    sessions, ground = store(clock), ground_of()
    sessions.open((FAMILY, "used"), ground)
    sessions.open((FAMILY, "unused"), ground)
    clock.advance(40)
    assert sessions.find((FAMILY, "used"), ground)
    clock.advance(20)

    assert sessions.find((FAMILY, "unused"), ground) is None
    assert sessions.find((FAMILY, "used"), ground)
    clock.advance(60)
    sessions.expire()
    told = sessions.statistics()
    assert (told["open"], told["bytes"], told["expired"]) == (0, 0, 2)


def test_the_byte_bound_wins_and_the_longest_unused_goes():
    ground = ground_of()
    one = store()
    one.open((FAMILY, "0000"), ground)
    sessions = store(bytes_max=5 * one.statistics()["bytes"], count_max=10_000)
    for number in range(10_000):
        sessions.open((FAMILY, f"{number:04}"), ground)
        sessions.find((FAMILY, "0000"), ground)
        assert sessions.statistics()["bytes"] <= 5 * one.statistics()["bytes"]

    told = sessions.statistics()
    assert (told["open"], told["evicted"]) == (5, 9_995)
    assert sessions.find((FAMILY, "0000"), ground)
    assert [
        key for key in range(9_990, 10_000) if sessions.find((FAMILY, f"{key:04}"), ground)
    ] == [
        9_996,
        9_997,
        9_998,
        9_999,
    ]


def test_the_number_is_bounded_too():
    sessions, ground = store(count_max=2), ground_of()
    for key in ("ada", "bob", "eve"):
        sessions.open((FAMILY, key), ground)

    assert sessions.find((FAMILY, "ada"), ground) is None
    assert sessions.statistics()["open"] == 2


def test_a_session_larger_than_all_bytes_is_refused():
    sessions = store(bytes_max=100)

    with pytest.raises(CapacityError) as caught:
        sessions.open((FAMILY, "ada"), ground_of())

    assert caught.value.code == "session_too_large"
    assert sessions.statistics()["open"] == 0


@pytest.mark.parametrize("key", ["", "x" * 257])
def test_a_key_has_a_length(key):
    with pytest.raises(RequestError) as caught:
        store().open((FAMILY, key), ground_of())

    assert caught.value.code == "bad_session_key"


def test_closing_ends_one_and_wiping_forgets_all_of_them():
    ended = []
    sessions, ground = (
        store(on_end=lambda family, head: ended.append((family, head.labels))),
        ground_of(),
    )
    for key in ("ada", "bob", "eve"):
        taught(sessions, key, ground)
    sessions.open(("elsewhere", "ada"), ground)

    assert sessions.close((FAMILY, "ada"))
    assert not sessions.close((FAMILY, "ada"))
    assert sessions.find((FAMILY, "ada"), ground) is None
    assert sessions.wipe(FAMILY) == 2
    assert sessions.wipe() == 1
    told = sessions.statistics()
    assert (told["open"], told["bytes"], told["closed"], told["wiped"]) == (0, 0, 1, 3)
    assert ended == [(FAMILY, 3)]


def test_sessions_survive_a_restart_as_old_as_they_are():
    clock, ground = ManualClock(1000.0), ground_of()
    sessions = store(clock)
    taught(sessions, "old", ground)
    clock.advance(30)
    taught(sessions, "new", ground)
    kept, before = sessions.snapshot(), sessions.find((FAMILY, "new"), ground).encode()

    clock.advance(40)
    again = store(clock)
    again.restore(kept, {FAMILY: ground})
    assert again.find((FAMILY, "old"), ground) is None
    assert again.find((FAMILY, "new"), ground).encode() == before
    assert again.statistics()["expired"] == 1


def test_a_restart_on_another_release_rebases_and_leaves_out_unknown_families():
    clock, ground = ManualClock(), ground_of()
    sessions = store(clock)
    taught(sessions, "ada", ground)
    sessions.open(("gone", "ada"), ground)

    again, other = store(clock), ground_of(region=1.0)
    again.restore(sessions.snapshot(), {FAMILY: other})
    head = again.find((FAMILY, "ada"), other)
    assert (head.prior, head.labels) == (other.prior, 3)
    assert again.statistics()["outgrown"] == 1


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-1], lambda data: data[8:]])
def test_a_snapshot_that_cannot_be_read_changes_nothing(spoil):
    sessions = store()
    taught(sessions, "ada", ground_of())
    again = store()

    with pytest.raises(RequestError) as caught:
        again.restore(spoil(sessions.snapshot()), {})

    assert caught.value.code == "bad_sessions"
    assert again.statistics()["open"] == 0


def test_a_flipped_bit_is_seen():
    sessions = store()
    taught(sessions, "ada", ground_of())
    kept = bytearray(sessions.snapshot())
    kept[-20] ^= 1

    with pytest.raises(RequestError):
        store().restore(bytes(kept), {})


def test_sessions_that_are_late_are_moved_one_by_one_and_the_last_used_first():
    sessions, ground, other = store(), ground_of(), ground_of(region=1.0)
    for key in ("ada", "bob", "eve"):
        taught(sessions, key, ground)
    sessions.open(("elsewhere", "ada"), ground)

    late = sessions.late(FAMILY, other)
    assert late == [(FAMILY, key) for key in ("eve", "bob", "ada")]
    for name in [*late, (FAMILY, "gone")]:
        moved(sessions, name, other)

    assert sessions.late(FAMILY, other) == []
    assert sessions.find(("elsewhere", "ada"), ground).prior is ground.prior
    assert sessions.find((FAMILY, "bob"), other).labels == 3
    assert sessions.statistics()["rebased"] == 3


def test_who_comes_before_it_was_moved_is_moved_then():
    sessions, ground, other = store(), ground_of(), ground_of(region=1.0)
    taught(sessions, "ada", ground)

    assert sessions.find((FAMILY, "ada"), other).prior is other.prior
    assert sessions.late(FAMILY, other) == []


def test_the_same_prior_again_changes_no_bit():
    sessions, ground = store(), ground_of()
    taught(sessions, "ada", ground, labels=300)
    before = sessions.find((FAMILY, "ada"), ground).encode()

    again = ground_of()
    assert sessions.find((FAMILY, "ada"), again).encode() == before
    assert sessions.statistics()["rebased"] == 0


def test_on_other_features_a_session_begins_anew():
    sessions, ground = store(), ground_of()
    taught(sessions, "ada", ground)
    other = Ground(prior_of(1.0), "other", WIDTH, embed)

    assert sessions.find((FAMILY, "ada"), other) is None
    assert sessions.statistics()["outgrown"] == 1


def test_a_model_that_cannot_be_run_on_what_was_costs_the_session_alone():
    def fails(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise PackageError("run_failed", f"{len(rows)} rows")

    sessions, ground = store(), ground_of()
    taught(sessions, "ada", ground)

    assert sessions.find((FAMILY, "ada"), Ground(prior_of(1.0), "spec", WIDTH, fails)) is None
    assert sessions.statistics()["unreadable"] == 1


def test_one_session_never_touches_another():
    sessions, ground = store(), ground_of()
    taught(sessions, "ada", ground)
    before = sessions.find((FAMILY, "ada"), ground).encode()
    enemy = sessions.open((FAMILY, "eve"), ground)
    for number in range(2000):
        enemy.adapt(row(number % 50), 0.5, (1.0, 0.0, float("nan"), 1e30)[number % 4])

    assert sessions.find((FAMILY, "ada"), ground).encode() == before


def heavy(ground: Ground) -> Ground:
    return replace(ground, quick=False)


def test_a_heavy_model_is_not_run_by_who_asks():
    def fails(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError(f"{len(rows)} rows")

    sessions, ground = store(), ground_of()
    taught(sessions, "ada", ground)
    other = Ground(prior_of(1.0), "spec", WIDTH, fails, quick=False)

    assert sessions.find((FAMILY, "ada"), other) is None
    assert sessions.open((FAMILY, "ada"), other) is None
    told = sessions.statistics()
    assert (told["open"], told["opened"]) == (1, 1)
    assert sessions.late(FAMILY, other) == [(FAMILY, "ada")]


def test_a_moved_session_is_as_one_that_came_by_itself():
    sessions, ground, other = store(), ground_of(), ground_of(1.0)
    for key in ("ada", "bob"):
        taught(sessions, key, ground)

    moved(sessions, (FAMILY, "ada"), heavy(other))

    ada, bob = (sessions.find((FAMILY, key), other) for key in ("ada", "bob"))
    assert ada.encode() == bob.encode()
    assert ada.prior is other.prior


def test_a_session_that_is_told_something_on_its_way_is_late_as_before():
    sessions, ground, other = store(), ground_of(), heavy(ground_of(1.0))
    name = FAMILY, "ada"
    taught(sessions, "ada", ground)

    moved(sessions, name, other, meanwhile=lambda: sessions.reset(name))
    assert sessions.late(FAMILY, other) == [name]
    moved(sessions, name, other)

    assert sessions.find(name, other).labels == 0
    moved(sessions, name, heavy(ground_of(1.5)), meanwhile=lambda: sessions.close(name))
    assert sessions.statistics()["open"] == 0


def test_a_restart_runs_no_model():
    clock, ground = ManualClock(), ground_of()
    sessions = store(clock)
    taught(sessions, "ada", ground)

    def fails(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError(f"{len(rows)} rows")

    other, twin = Ground(prior_of(1.0), "spec", WIDTH, fails), replace(ground, release="next")
    for each in (other, replace(twin, embed=fails)):
        again = store(clock)
        again.restore(sessions.snapshot(), {FAMILY: each})
        assert again.late(FAMILY, each) == [(FAMILY, "ada")]
    back = store(clock)
    back.restore(again.snapshot(), {FAMILY: twin})
    assert back.find((FAMILY, "ada"), twin).labels == 3


@pytest.mark.parametrize("unused_s", [float("nan"), float("inf"), -float("inf"), -1e9])
def test_kept_sessions_of_no_age_are_over(unused_s):
    sessions, ground = store(), ground_of()
    taught(sessions, "ada", ground)
    kept = snapshot.decode(sessions.snapshot())
    entry = msgspec.structs.replace(kept.entries[0], unused_s=unused_s)

    again = store()
    again.restore(snapshot.encode(kept.saved_s, [entry]), {FAMILY: ground})

    assert again.statistics()["open"] == 0


@pytest.mark.parametrize("saved_s", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_sessions_that_were_kept_at_no_time_end_all_the_same(saved_s):
    clock, ground = ManualClock(1000.0), ground_of()
    sessions = store(clock)
    taught(sessions, "ada", ground)
    kept = snapshot.decode(sessions.snapshot())

    again = store(clock)
    again.restore(snapshot.encode(saved_s, kept.entries), {FAMILY: ground})
    clock.advance(60)
    again.expire()

    assert again.statistics()["open"] == again.statistics()["bytes"] == 0


def test_a_kept_session_that_comes_twice_is_one():
    sessions, ground = store(), ground_of()
    taught(sessions, "ada", ground)
    kept = snapshot.decode(sessions.snapshot())

    again = store()
    again.restore(snapshot.encode(kept.saved_s, kept.entries * 2), {FAMILY: ground})

    assert again.statistics()["bytes"] == sessions.statistics()["bytes"]


def test_kept_texts_that_are_none_are_refused():
    body = msgspec.msgpack.encode([1, 0.0, [["shop", b"ada", "", 0.0, b"", ""]]])
    body = body.replace(b"\xc4\x03ada", b"\xa3\xff\xfe\xfd")
    data = b"HWSE" + zlib.crc32(body).to_bytes(4, "little") + body

    with pytest.raises(RequestError) as caught:
        store().restore(data, {})

    assert caught.value.code == "bad_sessions"
