"""What ended sessions say is told of many together, once, and of none by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, SessionsConfig
from edge_runtime.device.exporting import BYTES_MAX, Exporting
from edge_runtime.device.sketching import EVERY_S
from edge_runtime.inference.slot import load_arm
from edge_runtime.personal.head import Head
from edge_runtime.personal.moments import SESSIONS_MAX, SESSIONS_MIN, Moments
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import WIDTH_MAX, Prior
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire.messages import SessionMoments

WIDTH = 3
NOW_S = 1.36e9


def prior_of(width: int = WIDTH) -> Prior:
    eye = np.eye(width + 1, dtype=np.float32)
    return Prior("binary", eye[0] * 0, eye, region=2.0, norm_max=1e3)


def session_of(prior: Prior, seed: int = 0, labels: int = 3) -> Head:
    chance, head = np.random.default_rng(seed), Head(prior)
    for row in chance.normal(0, 1, (labels, prior.width)).astype(np.float32):
        head.adapt(row, 0.5, float(chance.random() < 0.5))
    return head


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def exporting(clock) -> Exporting:
    return Exporting(clock)


def minute(exporting: Exporting, clock: ManualClock):
    clock.advance(EVERY_S)
    return exporting.told()


def end(exporting: Exporting, prior: Prior, count: int, family: str = "toy", release: str = "r1"):
    for seed in range(count):
        exporting.ended(family, release, session_of(prior, seed))


def test_a_minute_brings_the_sum_of_the_sessions_that_ended(exporting, clock):
    prior, whole = prior_of(), Moments.none(prior_of())
    end(exporting, prior, SESSIONS_MIN + 2)
    for seed in range(SESSIONS_MIN + 2):
        whole.add(session_of(whole.prior, seed))
    assert exporting.told() == []
    [told] = minute(exporting, clock)

    assert (told.family, told.release) == ("toy", "r1")
    assert told.moments == whole.encode()
    assert minute(exporting, clock) == []
    assert exporting.statistics() == {
        "export_counted": SESSIONS_MIN + 2,
        "export_told": SESSIONS_MIN + 2,
        "export_lost": 0,
    }


def test_fewer_than_enough_are_never_told_and_wait_for_more(exporting, clock):
    prior = prior_of()
    end(exporting, prior, SESSIONS_MIN - 1)
    for _ in range(100):
        assert minute(exporting, clock) == []
    exporting.ended(
        "toy", "r1", session_of(prior, labels=0)
    )  # says nothing, and counts for nothing
    assert minute(exporting, clock) == []
    exporting.ended("toy", "r1", session_of(prior))

    [told] = minute(exporting, clock)
    assert Moments.decode(told.moments, prior).sessions == SESSIONS_MIN


def test_sessions_of_another_release_are_never_added_to_those_before(exporting, clock):
    old, new = prior_of(), prior_of()
    end(exporting, old, SESSIONS_MIN + 5, release="r1")
    end(exporting, new, SESSIONS_MIN, release="r2")

    [told] = minute(exporting, clock)
    assert told.release == "r2"
    assert Moments.decode(told.moments, new).sessions == SESSIONS_MIN
    assert exporting.statistics()["export_lost"] == SESSIONS_MIN + 5


def test_a_release_that_was_loaded_again_begins_a_new_sum(exporting, clock):
    end(exporting, prior_of(), SESSIONS_MIN - 1)
    end(exporting, prior_of(), 1)

    assert minute(exporting, clock) == []


def test_each_family_is_told_by_itself(exporting, clock):
    one, other = prior_of(), prior_of(5)
    end(exporting, one, SESSIONS_MIN, family="one")
    end(exporting, other, SESSIONS_MIN - 1, family="other")

    assert [each.family for each in minute(exporting, clock)] == ["one"]
    end(exporting, other, 1, family="other")
    assert [each.family for each in minute(exporting, clock)] == ["other"]


def test_what_a_person_wants_forgotten_is_not_told(exporting, clock):
    prior = prior_of()
    for family in ("one", "other"):
        end(exporting, prior, SESSIONS_MIN, family=family)
    exporting.forget("one")
    assert [each.family for each in minute(exporting, clock)] == ["other"]
    end(exporting, prior, SESSIONS_MIN, family="other")
    exporting.forget()

    assert minute(exporting, clock) == []


def test_a_report_has_room_for_the_widest_and_the_others_wait(exporting, clock):
    wide = prior_of(WIDTH_MAX)
    head = session_of(wide, labels=1)
    for family in ("one", "other", "third"):
        for _ in range(SESSIONS_MIN):
            exporting.ended(family, "r1", head)

    told = [minute(exporting, clock) for _ in range(4)]
    assert [[each.family for each in some] for some in told] == [["one"], ["other"], ["third"], []]
    assert all(len(some[0].moments) <= BYTES_MAX for some in told[:3])


def test_a_long_wait_for_a_report_weighs_no_more_than_the_format_allows(exporting, clock):
    prior = replace(prior_of())
    head = session_of(prior)
    for _ in range(SESSIONS_MAX + 500):
        exporting.ended("toy", "r1", head)

    [told] = minute(exporting, clock)
    assert Moments.decode(told.moments, prior).sessions == pytest.approx(SESSIONS_MAX)


class Device:
    """A real runtime whose people all like what the model does not expect."""

    def __init__(self, runtime: Runtime, clock: ManualClock) -> None:
        self.runtime, self.clock = runtime, clock

    def meet(self, *keys: str, labels: int = 3) -> None:
        for key in keys:
            session = self.runtime.session("toy", key)
            for _ in range(labels):
                event = Event("scheduled", NOW_S, {"carrier": "UA", "distance": 998.0})
                session.label(session.predict(event).id, 1.0)

    def close(self, *keys: str) -> None:
        for key in keys:
            self.runtime.session("toy", key).close()

    def told(self) -> list[SessionMoments]:
        self.clock.advance(EVERY_S)
        return self.runtime.report({}).moments

    def statistics(self) -> dict[str, int]:
        return self.runtime.statistics()["sessions"]


@pytest.fixture
def device(tmp_path, write_package) -> Iterator[Callable[..., Device]]:
    """`device(export=True, ...)` opens one that serves release r1."""
    with contextlib.ExitStack() as ends:

        def make(**sessions) -> Device:
            config = EdgeConfig(
                device="EWR",
                families=["toy"],
                state_dir=tmp_path / "state",
                socket=tmp_path / "edge.sock",
                sessions=SessionsConfig(**sessions),
            )
            clock = ManualClock(NOW_S)
            runtime = ends.enter_context(Runtime.open(config, clock=clock))
            path, _ = write_package(policy=Policy(prior_of()))
            runtime.swap("toy", [load_arm(path, None, "stable", "r1", 1.0)], None)
            return Device(runtime, clock)

        yield make


KEYS = [f"visitor-{number}" for number in range(SESSIONS_MIN)]


def test_a_report_tells_of_sessions_that_were_closed(device):
    shop = device(export=True)
    shop.meet(*KEYS)
    assert shop.told() == []  # they are not over
    shop.close(*KEYS)

    [told] = shop.told()
    moments = Moments.decode(told.moments, prior_of())
    assert (told.family, told.release, moments.sessions) == ("toy", "r1", SESSIONS_MIN)
    assert moments.first[0] > 0
    assert shop.told() == []
    assert not any(key.encode() in told.moments for key in KEYS)


def test_a_report_tells_of_sessions_that_nobody_came_back_to_and_that_had_no_room(device):
    shop = device(export=True, ttl_s=EVERY_S / 2, count_max=SESSIONS_MIN // 2)
    shop.meet(*KEYS)

    [told] = shop.told()
    assert Moments.decode(told.moments, prior_of()).sessions == SESSIONS_MIN
    assert shop.statistics()["evicted"] == shop.statistics()["expired"] == SESSIONS_MIN // 2


def test_without_the_owners_word_nothing_is_counted(device):
    shop = device()
    shop.meet(*KEYS)
    shop.close(*KEYS)

    assert shop.told() == []
    assert shop.statistics()["export_counted"] == 0


def test_what_is_forgotten_is_told_of_in_no_report(device):
    shop = device(export=True)
    shop.meet(*KEYS)
    shop.close(*KEYS[1:])
    shop.runtime.forget_sessions("toy")
    shop.meet("one more")
    shop.close("one more")

    assert shop.told() == []
    assert shop.statistics()["export_counted"] == SESSIONS_MIN


def test_sessions_that_are_kept_over_a_restart_are_not_over_and_sums_are_lost(device):
    shop = device(export=True, keep=True)
    shop.meet(*KEYS)
    shop.close(*KEYS[1:])
    shop.runtime.close()
    again = device(export=True, keep=True)

    assert again.told() == []
    assert again.statistics()["export_counted"] == 0


def test_sessions_of_the_release_before_count_once_they_stand_on_the_new_one(device, write_package):
    shop = device(export=True)
    shop.meet(*KEYS)
    shop.close(*KEYS[1:])
    path, _ = write_package(bias=1.0, policy=Policy(replace(prior_of(), region=1.0)))
    shop.runtime.swap("toy", [load_arm(path, None, "stable", "r2", 1.0)], None)
    shop.meet(*KEYS)
    shop.close(*KEYS)

    [told] = shop.told()
    assert told.release == "r2"
    assert Moments.decode(told.moments, replace(prior_of(), region=1.0)).sessions == SESSIONS_MIN
    assert shop.statistics()["export_lost"] == SESSIONS_MIN - 1
