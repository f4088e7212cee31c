"""Promises of a rollout over crowds: C5, C7, C11 and S6. A crowd here has 2,000 devices; in
`make slow` it has ten thousand.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cloud_learner.simulate.crowd import DAY_S, SLEEP_S, Crowd, Model, World, draw, spread_of
from cloud_learner.simulate.crowd_cycle import cycle_cost
from cloud_learner.simulate.crowd_trial import RULES, campaign_over
from cloud_learner.stats.scores import auc

SMALL = World(devices=2_000, requests_a_day=30.0, cv=0.5)
FEW = msgspec.structs.replace(RULES, stages=(5.0, 25.0, 100.0))
LARGE = pytest.mark.slow
SIZES = [(SMALL, FEW, 1), pytest.param(World(), RULES, 10, marks=LARGE)]


def crowds(world, model, seeds, **changes):
    """A crowd for each seed."""
    for seed in range(seeds):
        yield Crowd(msgspec.structs.replace(world, seed=seed, **changes), model)


@pytest.mark.parametrize(("world", "rules", "seeds"), SIZES)
@pytest.mark.parametrize("model", [Model(failure_ratio=10.0), Model(auc_lost=0.02), Model()])
def test_c5_no_device_ever_has_more_than_the_plan_allows_and_a_bad_release_stays_in_its_stage(
    world, rules, seeds, model
):
    for crowd in crowds(world, model, seeds):
        course = campaign_over(crowd, rules)
        name = f"seed {crowd.world.seed}"
        assert course.beyond == 0, name
        assert course.peak > 0, name
        if model != Model():
            assert course.ending in ("harm", "undecided"), name
            assert course.allowed == rules.stages[0], name
            assert course.peak < 25, name


@pytest.mark.parametrize(("world", "rules", "seeds"), SIZES)
def test_c5_after_the_decision_the_release_goes_from_each_device_once_it_is_online(
    world, rules, seeds
):
    for crowd in crowds(world, Model(failure_ratio=10.0), seeds):
        course = campaign_over(crowd, rules)
        assert course.ending == "harm"
        [last] = course.plans[-1:]
        now_s = course.days * DAY_S
        tried = crowd.tries.copy()
        crowd.step(last, now_s)
        assert not (crowd.tries & crowd.online(now_s)).any()
        while crowd.tries.any():
            now_s += world.step_s
            assert now_s < (course.days + 1) * DAY_S, "nobody is offline for longer"
            crowd.step(last, now_s)
        assert tried.any()


@pytest.mark.parametrize(("world", "rules", "seeds"), SIZES)
def test_c7_who_slept_through_all_stages_lands_on_the_decision(world, rules, seeds):
    for crowd in crowds(world, Model(failure_ratio=10.0), seeds, sleepers=0.2):
        course = campaign_over(crowd, rules)
        asleep = ~(
            crowd.online(course.days * DAY_S) | crowd.online(course.days * DAY_S + DAY_S / 2)
        )
        reports, _ = crowd.step(course.plans[-1], SLEEP_S + DAY_S)
        woken = [each for each in reports if asleep[crowd.names.index(each.device)]]
        assert len(woken) > world.devices / 20
        assert {tuple(arm.release for arm in each.arms) for each in woken} == {("r1",)}
        assert {each.plan_seq for each in woken} == {course.plans[-1].seq}


@pytest.mark.parametrize(("world", "rules", "seeds"), SIZES)
def test_c11_and_s6_no_lies_stop_a_good_release_for_harm_and_hardly_any_hold_it_up(
    world, rules, seeds
):
    accused = crowds(world, Model(), seeds, liars=0.01, lies="harm")
    endings = [campaign_over(crowd, rules).ending for crowd in accused]
    assert "harm" not in endings
    assert endings.count("promoted") >= 0.9 * seeds, endings


@pytest.mark.parametrize(("world", "rules", "seeds"), SIZES)
def test_c11_and_s6_no_praise_brings_a_bad_release_beyond_its_stage(world, rules, seeds):
    for crowd in crowds(world, Model(auc_lost=0.02), seeds, liars=0.01, lies="praise"):
        course = campaign_over(crowd, rules)
        name = f"seed {crowd.world.seed}"
        assert course.ending in ("harm", "undecided"), name
        assert (course.allowed, course.beyond) == (rules.stages[0], 0), name


def test_c11_labels_of_devices_that_no_stage_is_on_count_for_nothing():
    crowd = next(crowds(SMALL, Model(), 1, liars=0.5, lies="harm"))
    course = campaign_over(crowd, msgspec.structs.replace(FEW, stages=(0.0, 100.0), stage_s=DAY_S))

    assert (course.ending, course.pairs, course.peak) == ("undecided", 0, 0)


def test_the_model_that_is_worse_loses_the_auc_that_it_says_and_both_are_calibrated():
    bias = np.full(100_000, -1.4)
    old, new, labels = draw(np.random.default_rng(1), bias, spread_of(0.02))

    assert abs(auc(labels, old) - auc(labels, new) - 0.02) < 0.003
    for answers in (old, new):
        assert abs(answers.mean() - labels.mean()) < 0.005


@pytest.mark.parametrize("devices", [100, pytest.param(10_000, marks=LARGE)])
def test_a_report_of_each_device_comes_to_a_decision_and_a_plan(tmp_path, devices):
    cost = cycle_cost(tmp_path, devices)

    assert cost.ending == "harm"
    assert 0 < cost.signatures_s < cost.cycle_s
