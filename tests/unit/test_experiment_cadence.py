"""Cadences: which version answers when."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloud_learner.experiment.cadence import Cadence, cadences_of, span_s
from edge_runtime.errors import ConfigError

READY_S = np.array([5.0, 12.0, 20.0, 21.0])
TIMES_S = np.array([0.0, 5.0, 9.9, 10.0, 19.9, 20.0, 29.9, 30.0])


def test_a_prediction_is_answered_by_what_was_ready_before_the_last_sync():
    found = Cadence("10s", 10.0).versions(TIMES_S, READY_S, start_s=0.0, phase=0.0)

    # Version 3 was ready at 20.0, the very moment of a sync: it is shipped with the next.
    assert found.tolist() == [0, 0, 0, 1, 1, 2, 2, 4]


def test_a_phase_moves_all_syncs_and_before_the_first_the_warm_up_answers():
    found = Cadence("10s", 10.0).versions(TIMES_S, READY_S, start_s=0.0, phase=0.6)

    assert found.tolist() == [0, 0, 1, 1, 2, 2, 4, 4]


def test_never_is_the_warm_up_for_ever():
    never = Cadence("never", math.inf)

    assert never.versions(TIMES_S, READY_S, 0.0, 0.0).tolist() == [0] * 8
    assert never.phases(5) == [0.0]
    assert Cadence("1d", 86400.0).phases(4) == [0.0, 0.25, 0.5, 0.75]


def test_nobody_is_answered_by_a_version_that_was_not_ready():
    random = np.random.default_rng(4)
    times_s = np.sort(random.uniform(0, 100, 500))
    ready_s = np.sort(random.choice(times_s, 40, replace=False))
    for every_s in (0.5, 3.0, 40.0):
        for phase in (0.0, 0.3):
            versions = Cadence("", every_s).versions(times_s, ready_s, 0.0, phase)
            used = versions > 0
            assert (ready_s[versions[used] - 1] < times_s[used]).all()
            assert (np.diff(versions) >= 0).all()


def test_cadences_come_from_slow_to_fast():
    found = cadences_of("1h, never,7d,90m")

    assert [each.name for each in found] == ["never", "7d", "90m", "1h"]
    assert [each.every_s for each in found] == [math.inf, 604800.0, 5400.0, 3600.0]


@pytest.mark.parametrize("text", ["", "1d", "never,never", "1d,24h", "1d,7w", "1d,-1h", "1d,0h"])
def test_what_is_no_choice_of_cadences_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        cadences_of(text)

    assert caught.value.code == "bad_cadence"
    assert caught.value.hint


def test_a_span_has_a_number_and_a_unit():
    assert span_s("1.5d", "bad_policy") == 129600.0
    with pytest.raises(ConfigError, match="'d' is no span"):
        span_s("d", "bad_policy")
