"""The thread that ends and moves sessions: there while there are any, and never in the way."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.clock import ManualClock, SystemClock
from edge_runtime.device.keeper import Keeper
from edge_runtime.personal.ground import Ground
from edge_runtime.personal.pending import Answered, Pending
from edge_runtime.personal.prior import Prior
from edge_runtime.personal.sessions import Sessions

WIDTH, NAME = 4, ("shop", "ada")
ROW = np.ones(WIDTH, np.float32)


def prior_of(region=2.0):
    eye = np.eye(WIDTH + 1, dtype=np.float32)
    return Prior("binary", np.zeros(WIDTH + 1, np.float32), eye, region, norm_max=10.0)


def embed(rows):
    return rows, np.full(len(rows), 0.5, np.float32)


class Shop:
    """A keeper with all that it looks after."""

    def __init__(self, clock=None, ttl_s=60.0):
        clock = clock or ManualClock()
        self.turn, self.pending, self.grounds = threading.Lock(), Pending(1 << 20), {}
        self.sessions = Sessions(clock, ttl_s=ttl_s, bytes_max=1 << 20, count_max=1000)
        kept = self.sessions, self.pending, self.grounds
        self.keeper = Keeper(self.turn, *kept, clock=clock, ttl_s=ttl_s)
        self.pending.begun = self.keeper.begin
        self.ground = Ground(prior_of(), "spec", WIDTH, embed)
        self.stand_on(self.ground)

    def stand_on(self, ground):
        with self.turn:
            self.ground = self.grounds["shop"] = ground
            self.keeper.hasten()

    def answer(self, number):
        data = ROW.tobytes()
        with self.turn:
            self.pending.remember(
                number, Answered(*NAME, self.ground.prior, "spec", data, 0.5, data)
            )

    def teach(self, key="ada"):
        with self.turn:
            self.sessions.open(("shop", key), self.ground).adapt(ROW, 0.5, 1.0, ROW)


@pytest.fixture
def shop():
    shops = []

    def shop(*arguments):
        shops.append(Shop(*arguments))
        return shops[-1]

    yield shop
    for each in shops:
        each.keeper.close()


def until(condition, within_s=30.0):
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        os.sched_yield()


def test_what_nobody_uses_ends_and_so_does_the_thread(shop):
    shop = shop(SystemClock(), 0.05)

    for number in (1, 2, 1000):
        shop.answer(number)
        shop.teach()
        thread = shop.keeper._thread
        thread.join()

        assert (len(shop.sessions), len(shop.pending)) == (0, 0)


def test_without_sessions_there_is_no_thread(shop):
    shop = shop()
    shop.stand_on(replace(shop.ground, prior=prior_of(1.0)))
    shop.keeper.expire()

    assert not shop.keeper._thread.is_alive()


def test_no_model_is_run_in_a_turn(shop):
    shop, locked = shop(), []

    def watched(rows):
        locked.append(shop.turn.locked())
        return embed(rows)

    shop.answer(1)
    for number in range(20):
        shop.teach(str(number))
    shop.stand_on(Ground(prior_of(1.0), "spec", WIDTH, watched, quick=False))
    until(lambda: shop.sessions.statistics()["rebased"] == 20)

    assert locked == [False] * 20


def test_a_session_that_is_reset_meanwhile_is_moved_as_it_is_then(shop):
    shop, runs = shop(), []

    def interrupted(rows):
        runs.append(len(rows))
        with shop.turn:
            shop.sessions.reset(NAME)
        return embed(rows)

    shop.answer(1)
    shop.teach()
    shop.stand_on(Ground(prior_of(1.0), "spec", WIDTH, interrupted, quick=False))
    until(lambda: shop.sessions.statistics()["rebased"])

    assert runs == [1]
    assert shop.sessions.find(NAME, shop.ground).labels == 0


def test_what_serves_meanwhile_is_where_sessions_are_moved(shop):
    shop = shop()
    last = Ground(prior_of(0.5), "spec", WIDTH, embed, quick=False)

    def overtaken(rows):
        shop.stand_on(last)
        return embed(rows)

    shop.answer(1)
    shop.teach()
    shop.stand_on(Ground(prior_of(1.0), "spec", WIDTH, overtaken, quick=False))
    until(lambda: shop.sessions.statistics()["rebased"])

    assert shop.sessions.find(NAME, last).labels == 1
    assert shop.sessions.statistics()["rebased"] == 1


def test_who_closes_waits_for_no_session_and_begins_no_thread(shop):
    shop = shop()
    shop.answer(1)
    shop.teach()

    shop.keeper.close()
    shop.answer(2000)

    assert not shop.keeper._thread.is_alive()
    assert len(shop.sessions) == 1
