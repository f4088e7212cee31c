"""The store of sessions: few, small, and gone when nobody comes back."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.errors import CapacityError, RequestError
from edge_runtime.personal.prior import Prior
from edge_runtime.personal.sessions import Sessions

WIDTH = 4
FAMILY = "shop"


def prior_of(region: float = 2.0) -> Prior:
    eye = np.eye(WIDTH + 1, dtype=np.float32)
    return Prior("binary", np.zeros(WIDTH + 1, np.float32), eye, region, norm_max=10.0)


def store(clock: ManualClock | None = None, **bounds) -> Sessions:
    given = {"ttl_s": 60.0, "bytes_max": 1 << 20, "count_max": 100, **bounds}
    return Sessions(clock or ManualClock(1000.0), **given)


def row(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, WIDTH).astype(np.float32)


def embed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows, np.full(len(rows), 0.5, np.float32)


def taught(sessions: Sessions, key: str, prior: Prior, labels: int = 3) -> None:
    head = sessions.open(FAMILY, key, prior, WIDTH)
    for number in range(labels):
        head.adapt(row(number), 0.5, float(number % 2), row(number))


def test_a_session_opens_by_itself_and_is_found_again():
    sessions, prior = store(), prior_of()

    assert sessions.find(FAMILY, "ada") is None
    head = sessions.open(FAMILY, "ada", prior)
    assert sessions.open(FAMILY, "ada", prior) is head
    assert sessions.find(FAMILY, "ada") is head
    assert sessions.find("other", "ada") is None
    assert sessions.statistics()["opened"] == 1


def test_unused_it_ends_and_used_it_lasts():
    clock = ManualClock()
    sessions, prior = store(clock), prior_of()
    sessions.open(FAMILY, "used", prior)
    sessions.open(FAMILY, "unused", prior)
    clock.advance(40)
    assert sessions.find(FAMILY, "used")
    clock.advance(20)

    assert sessions.find(FAMILY, "unused") is None
    assert sessions.find(FAMILY, "used")
    clock.advance(60)
    sessions.expire()
    told = sessions.statistics()
    assert (told["open"], told["bytes"], told["expired"]) == (0, 0, 2)


def test_the_byte_bound_wins_and_the_longest_unused_goes():
    prior = prior_of()
    one = store()
    one.open(FAMILY, "0000", prior)
    sessions = store(bytes_max=5 * one.statistics()["bytes"], count_max=10_000)
    for number in range(10_000):
        sessions.open(FAMILY, f"{number:04}", prior)
        sessions.find(FAMILY, "0000")
        assert sessions.statistics()["bytes"] <= 5 * one.statistics()["bytes"]

    told = sessions.statistics()
    assert (told["open"], told["evicted"]) == (5, 9_995)
    assert sessions.find(FAMILY, "0000")
    assert [key for key in range(9_990, 10_000) if sessions.find(FAMILY, f"{key:04}")] == [
        9_996,
        9_997,
        9_998,
        9_999,
    ]


def test_the_number_is_bounded_too():
    sessions, prior = store(count_max=2), prior_of()
    for key in ("ada", "bob", "eve"):
        sessions.open(FAMILY, key, prior)

    assert sessions.find(FAMILY, "ada") is None
    assert sessions.statistics()["open"] == 2


def test_a_session_larger_than_all_bytes_is_refused():
    sessions = store(bytes_max=100)

    with pytest.raises(CapacityError) as caught:
        sessions.open(FAMILY, "ada", prior_of())

    assert caught.value.code == "session_too_large"
    assert sessions.statistics()["open"] == 0


@pytest.mark.parametrize("key", ["", "x" * 257])
def test_a_key_has_a_length(key):
    with pytest.raises(RequestError) as caught:
        store().open(FAMILY, key, prior_of())

    assert caught.value.code == "bad_session_key"


def test_wiping_forgets_one_or_all():
    sessions, prior = store(), prior_of()
    for key in ("ada", "bob", "eve"):
        taught(sessions, key, prior)

    assert sessions.wipe(FAMILY, "ada")
    assert not sessions.wipe(FAMILY, "ada")
    assert sessions.find(FAMILY, "ada") is None
    sessions.wipe_all()
    told = sessions.statistics()
    assert (told["open"], told["bytes"], told["wiped"]) == (0, 0, 3)


def test_sessions_survive_a_restart_as_old_as_they_are():
    clock, prior = ManualClock(1000.0), prior_of()
    sessions = store(clock)
    taught(sessions, "old", prior)
    clock.advance(30)
    taught(sessions, "new", prior)
    kept, before = sessions.snapshot(), sessions.find(FAMILY, "new").encode()

    clock.advance(40)
    again = store(clock)
    again.restore(kept, {FAMILY: (prior, embed)})
    assert again.find(FAMILY, "old") is None
    assert again.find(FAMILY, "new").encode() == before
    assert again.statistics()["expired"] == 1


def test_a_restart_on_another_release_rebases_and_leaves_out_unknown_families():
    clock, prior = ManualClock(), prior_of()
    sessions = store(clock)
    taught(sessions, "ada", prior)
    sessions.open("gone", "ada", prior)

    again, other = store(clock), prior_of(region=1.0)
    again.restore(sessions.snapshot(), {FAMILY: (other, embed)})
    head = again.find(FAMILY, "ada")
    assert (head.prior, head.labels) == (other, 3)
    assert again.statistics()["unreadable"] == 1


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-1], lambda data: data[8:]])
def test_a_snapshot_that_cannot_be_read_changes_nothing(spoil):
    sessions = store()
    taught(sessions, "ada", prior_of())
    again = store()

    with pytest.raises(RequestError) as caught:
        again.restore(spoil(sessions.snapshot()), {})

    assert caught.value.code == "bad_sessions"
    assert again.statistics()["open"] == 0


def test_a_flipped_bit_is_seen():
    sessions = store()
    taught(sessions, "ada", prior_of())
    kept = bytearray(sessions.snapshot())
    kept[-20] ^= 1

    with pytest.raises(RequestError):
        store().restore(bytes(kept), {})


def test_rebasing_goes_by_portions_and_the_last_used_first():
    sessions, prior, other = store(), prior_of(), prior_of(region=1.0)
    for key in ("ada", "bob", "eve"):
        taught(sessions, key, prior)
    sessions.open("elsewhere", "ada", prior)

    assert sessions.rebase(FAMILY, other, embed, at_most=2) == 2
    assert sessions.find(FAMILY, "ada").prior is prior
    assert sessions.find(FAMILY, "eve").prior is other
    assert sessions.rebase(FAMILY, other, embed, at_most=2) == 1
    assert sessions.rebase(FAMILY, other, embed, at_most=2) == 0
    assert sessions.find("elsewhere", "ada").prior is prior
    assert sessions.find(FAMILY, "bob").labels == 3


def test_one_session_never_touches_another():
    sessions, prior = store(), prior_of()
    taught(sessions, "ada", prior)
    before = sessions.find(FAMILY, "ada").encode()
    enemy = sessions.open(FAMILY, "eve", prior)
    for number in range(2000):
        enemy.adapt(row(number % 50), 0.5, (1.0, 0.0, float("nan"), 1e30)[number % 4])

    assert sessions.find(FAMILY, "ada").encode() == before
