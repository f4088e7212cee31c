"""Hostile moments against the learner: refused by name, or they move the prior within bounds."""

from __future__ import annotations

import random
import struct
from collections import Counter

import msgspec
import numpy as np
import pytest

from cloud_learner.train.pooled import CAP, Pooled
from cloud_learner.train.prior import STRENGTH
from edge_runtime.errors import RequestError
from edge_runtime.personal.head import Head
from edge_runtime.personal.moments import DEVIATIONS_MAX, Moments
from edge_runtime.personal.prior import Prior

COUNT = pytest.mark.parametrize("count", [5_000, pytest.param(500_000, marks=pytest.mark.slow)])
WIDTH = 4
NUMBERS = [0.0, -0.0, 1e-45, -1.0, 3e38, -3e38, float("nan"), float("inf"), -float("inf")]


def prior_of() -> Prior:
    chance = np.random.default_rng(1)
    root = chance.normal(0, 0.5, (WIDTH + 1, WIDTH + 1))
    covariance = (root @ root.T + 0.1 * np.eye(WIDTH + 1)).astype(np.float32)
    covariance = (covariance + covariance.T) / 2
    return Prior("binary", covariance[0] * 0, covariance, region=2.0, norm_max=10.0)


def good_of(prior: Prior) -> bytes:
    chance, moments = np.random.default_rng(2), Moments.none(prior)
    for _ in range(20):
        head = Head(prior)
        for row in chance.normal(0, 1, (8, WIDTH)).astype(np.float32):
            head.adapt(row, 0.5, float(chance.random() < 0.5))
        moments.add(head)
    return moments.encode()


def hostile(chance: random.Random, good: bytes) -> bytes:
    """Moments that are garbage, damaged, or well-formed with some numbers of the enemy's choice."""
    kind = chance.randrange(4)
    if kind == 0:
        return chance.randbytes(chance.randrange(3 * len(good)))
    if kind == 1:
        data = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
    fields = msgspec.msgpack.decode(good)
    for at in chance.sample([2, 3, 4], chance.randint(1, 3)):
        if at == 2:
            fields[2] = chance.choice([*NUMBERS, chance.uniform(0, 2000), fields[2]])
            continue
        values = [chance.choice([1.0, 1.0, chance.gauss(1, 2)]) * x for x in floats(fields[at])]
        if chance.random() < 0.3:
            values[chance.randrange(len(values))] = chance.choice(NUMBERS)
        fields[at] = struct.pack(f"<{len(values)}f", *values)
    return msgspec.msgpack.encode(fields)


def floats(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


@COUNT
def test_what_a_device_may_tell_is_refused_or_bounded(count: int) -> None:
    prior, told = prior_of(), Counter[str]()
    good = good_of(prior)
    share = CAP / (CAP + STRENGTH)
    for seed in range(count):
        data, pooled = hostile(random.Random(seed), good), Pooled(prior)
        try:
            pooled.take("device", data)
        except RequestError as error:
            told[error.code] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"hostile({seed}): crash") from error
        told["taken"] += 1
        after, sessions = pooled.next()
        moved = np.linalg.norm(prior.whitener @ (after.mean - prior.mean))
        wider = np.linalg.eigvalsh(prior.whitener @ after.covariance @ prior.whitener.T)[-1]
        assert 0 < sessions <= CAP, seed
        assert moved <= 1.02 * share * DEVIATIONS_MAX, (seed, moved)
        assert wider <= 1.02 * (1 + share * DEVIATIONS_MAX**2), (seed, wider)
    assert told.keys() == {"bad_moments", "taken"}
    assert min(told.values()) > count / 50, told
