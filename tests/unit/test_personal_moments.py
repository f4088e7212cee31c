"""Moments of the first version are read, and written, as they were."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

from edge_runtime.personal.moments import Moments
from edge_runtime.personal.prior import Prior

FROZEN = json.loads((Path(__file__).parents[1] / "fixtures" / "moments-v1.json").read_text())
PRIOR, TOLD = (base64.b64decode(FROZEN[name]) for name in ("prior_b64", "moments_b64"))


def test_frozen_moments_of_a_frozen_prior_say_what_they_said():
    prior = Prior.decode(PRIOR)
    moments = Moments.decode(TOLD, prior)

    assert prior.forgetting == 0.0625
    assert moments.sessions == FROZEN["sessions"]
    np.testing.assert_allclose(moments.first, FROZEN["first"], atol=1e-5)
    np.testing.assert_allclose(moments.second, FROZEN["second"], atol=1e-5)


def test_they_are_written_as_they_were_read():
    prior = Prior.decode(PRIOR)

    assert prior.encode() == PRIOR
    assert Moments.decode(TOLD, prior).encode() == TOLD
