"""The policy as a package carries it: what was written is read again, and by each later version."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.errors import PackageError
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior

FIXTURE = Path(__file__).parents[1] / "fixtures" / "policy-v1.json"
"""Frozen: a policy with a prior of version 1."""

MEAN = np.array([0.5, -0.25, 0.125, 0.0], np.float32)
COVARIANCE = np.array(
    [
        [1.0, 0.25, 0.0, -0.125],
        [0.25, 0.5, 0.0625, 0.0],
        [0.0, 0.0625, 0.75, 0.03125],
        [-0.125, 0.0, 0.03125, 0.25],
    ],
    np.float32,
)


def policy() -> Policy:
    facts = {"region": 2.5, "norm_max": 40.0, "noise": 0.5, "patience": 4.5, "forgetting": 0.0625}
    return Policy(Prior("regression", MEAN, COVARIANCE, **facts), 0.125, 0.75)


def test_the_first_version_is_read_as_it_was_written():
    text = FIXTURE.read_text()
    read = Policy.from_json(text)

    assert (read.explore, read.optimism) == (0.125, 0.75)
    prior = read.prior
    assert (prior.task, prior.region, prior.norm_max) == ("regression", 2.5, 40.0)
    assert (prior.noise, prior.patience, prior.forgetting) == (0.5, 4.5, 0.0625)
    assert np.array_equal(prior.mean, MEAN)
    assert np.array_equal(prior.covariance, COVARIANCE)
    assert read.to_json() == policy().to_json() == text


def test_the_prior_is_the_array_that_the_package_s_page_tells_of():
    told = base64.b64decode(json.loads(FIXTURE.read_text())["prior_b64"])
    *numbers, mean, covariance, forgetting = msgspec.msgpack.decode(told)

    assert numbers == [1, "regression", 2.5, 40.0, 0.5, 4.5]
    assert np.frombuffer(mean, "<f4").tolist() == MEAN.tolist()
    triangle = np.frombuffer(covariance, "<f4").tolist()
    assert triangle == [COVARIANCE[i, j] for i in range(4) for j in range(i + 1)]
    assert forgetting == 0.0625


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"version": 2}, "bad_policy"),
        ({"explore": 1.5}, "bad_policy"),
        ({"explore": -0.1}, "bad_policy"),
        ({"optimism": 11}, "bad_policy"),
        ({"optimism": None}, "bad_policy"),
        ({"prior_b64": "?"}, "bad_policy"),
        ({"prior_b64": ""}, "bad_prior"),
    ],
)
def test_what_is_no_policy_is_refused(change, code):
    with pytest.raises(PackageError) as caught:
        Policy.from_json(json.dumps(json.loads(FIXTURE.read_text()) | change))
    assert caught.value.code == code
