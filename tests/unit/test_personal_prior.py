"""The prior travels as bytes, and one that cannot be used never comes to be."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge_runtime.errors import PackageError
from edge_runtime.personal.prior import Prior

WIDTH = 5


def prior_of(seed: int = 1, task: str = "binary") -> Prior:
    chance = np.random.default_rng(seed)
    root = chance.normal(0, 0.4, (WIDTH + 1, WIDTH + 1))
    covariance = (root @ root.T + 0.05 * np.eye(WIDTH + 1)).astype(np.float32)
    covariance = (covariance + covariance.T) / 2
    mean = chance.normal(0, 0.1, WIDTH + 1).astype(np.float32)
    given = {"region": 1.5, "norm_max": 20.0, "noise": 0.3, "forgetting": 0.1}
    return Prior(task, mean, covariance, **given)


def test_a_prior_comes_back_bit_for_bit():
    prior = prior_of()
    back = Prior.decode(prior.encode())

    assert back.mean.tobytes() == prior.mean.tobytes()
    assert back.covariance.tobytes() == prior.covariance.tobytes()
    for name in ("task", "region", "norm_max", "noise", "patience", "forgetting"):
        assert getattr(back, name) == getattr(prior, name)
    assert back.digest == prior.digest
    assert back.digest != prior_of(seed=2).digest


def test_bytes_without_a_forgetting_are_of_a_prior_that_forgets_nothing():
    *stored, _ = msgspec.msgpack.decode(prior_of().encode())

    assert Prior.decode(msgspec.msgpack.encode(stored)).forgetting == 0


def test_at_64_numbers_it_takes_the_bytes_of_a_triangle():
    size = 65
    prior = Prior("binary", np.zeros(size, np.float32), np.eye(size, dtype=np.float32), 1.0, 1.0)

    assert len(prior.encode()) < 4 * size * (size + 1) // 2 + 4 * size + 64


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\x99\x02" + data[2:],  # another version
        lambda data: data.replace(b"binary", b"banana"),
        lambda data: bytes(255 - byte for byte in data),
    ],
)
def test_bytes_that_are_no_prior_are_refused(spoil):
    with pytest.raises(PackageError) as caught:
        Prior.decode(spoil(prior_of().encode()))

    assert caught.value.code == "bad_prior"
    assert "sessions answer as the model does" in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"task": "multiclass"},
        {"region": 0.0},
        {"region": float("inf")},
        {"noise": float("nan")},
        {"norm_max": float("inf")},
        {"patience": -1.0},
        {"forgetting": 1.0},
        {"forgetting": -0.1},
        {"forgetting": float("nan")},
        {"mean": np.zeros(3, np.float32)},
        {"mean": np.full(WIDTH + 1, np.nan, np.float32)},
        {"covariance": np.zeros((WIDTH + 1, WIDTH + 1), np.float32)},
        {"covariance": np.triu(np.ones((WIDTH + 1, WIDTH + 1), np.float32))},
        {"covariance": np.eye(WIDTH, dtype=np.float32)},
    ],
)
def test_a_prior_that_cannot_be_used_is_none(change):
    with pytest.raises(PackageError) as caught:
        replace(prior_of(), **change)

    assert caught.value.code == "bad_prior"
