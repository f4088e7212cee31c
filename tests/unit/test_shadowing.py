"""Shadows: compared on what really comes, and noticed by nobody."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.device.shadowing import QUEUE_ROWS, Comparison, Shadowing, agreement
from edge_runtime.features.spec import Spec
from edge_runtime.inference.slot import Slot
from edge_runtime.rollout.arms import load_plan_arm

OTHER_FEATURES = """
version = 1
[[features]]
name = "asked"
window = { over = "scheduled", statistic = "count", span_s = 3600.0 }
[[features]]
name = "distance"
field = "distance"
"""
FAULTS = ["", "fails", "nan", "shape", "slow"]


class Answering:
    """Those who answer, as a test says that they are."""

    def __init__(self) -> None:
        self.busy, self.us = False, 0.0

    def is_busy(self) -> bool:
        return self.busy

    def spent_us(self) -> float:
        return self.us


def compare(runtime):
    """Let the shadows be compared with all that waits."""
    shadowing = runtime._asking.shadowing
    while shadowing.statistics()["waiting"]:
        shadowing.turn()
    shadowing.turn()  # one that is under way is over then


def shadows(runtime):
    return {each.release: each for each in runtime.report({}).shadows}


def lived(trials, runtime, count=40):
    """What a device answers and logs, over some events with far ones between."""
    answers = []
    for turn in range(count):
        runtime.observe("toy", trials.event(kind="departed"))
        answers.append(trials.ask(runtime, far=turn % 2 == 1))
        if turn % 10 == 9:
            compare(runtime)
    return answers, trials.logged(runtime)


@pytest.fixture
def seated(trials):
    """A shadow beside a stable release in a slot, and a comparison that nobody judges."""
    stable, shadow = trials.arm(0.0), trials.arm(1.0, mode="shadow")
    slot = Slot("toy")
    slot.swap(
        [
            load_plan_arm(trials.shelf, name, arm)
            for name, arm in (("stable", stable), ("canary", shadow))
        ]
    )
    yield Comparison(slot, slot.resident[1], lambda *_: None)
    slot.close()


def row_of(comparison):
    return b"\0" * 4 * comparison.slot.arms[0].runner.features


@pytest.mark.parametrize("fault", FAULTS)
def test_s8_a_shadow_changes_no_bit_of_answers_and_log(trials, fault):
    stable = trials.arm(0.0)
    trials.plan(stable)
    with trials.open() as runtime:
        alone = lived(trials, runtime)
    trials.again()
    trials.plan(trials.arm(0.0), trials.arm(1.0, 1e9, fault, mode="shadow"))
    with trials.open() as runtime:
        assert runtime.model("toy").releases == ("r0",)
        assert lived(trials, runtime) == alone


def test_s8_what_waits_is_bounded_and_the_newest_goes(seated):
    load = Answering()
    load.busy = True
    shadowing = Shadowing(ManualClock(0.0), load)
    for _ in range(1000):
        shadowing.offer(seated, [row_of(seated)] * 2, [0.5])
        shadowing.turn()
    assert shadowing.statistics() == {"waiting": QUEUE_ROWS}
    report = seated.report("toy")
    assert (report.rows, report.dropped) == (0, 1000 - QUEUE_ROWS)
    load.busy = False
    while shadowing.statistics()["waiting"]:
        shadowing.turn()
    assert seated.report("toy").rows == QUEUE_ROWS


def test_s8_under_load_all_that_waits_is_dropped(seated):
    load, clock = Answering(), ManualClock(0.0)
    shadowing = Shadowing(clock, load)
    for busy_us, expected in ((600_000.0, (0, 9)), (100_000.0, (9, 9))):
        for _ in range(9):
            shadowing.offer(seated, [row_of(seated)] * 2, [0.5])
        clock.advance(1.0)
        load.us += busy_us
        while shadowing.statistics()["waiting"]:
            shadowing.turn()
        report = seated.report("toy")
        assert (report.rows, report.dropped) == expected


@pytest.mark.parametrize("fault", ["fails", "nan", "shape"])
def test_s8_a_shadow_that_gives_no_answers_is_left_and_nobody_notices(trials, fault):
    shadow = trials.arm(1.0, 1.0, fault, mode="shadow")
    trials.plan(trials.arm(0.0), shadow)
    with trials.open() as runtime:
        for _ in range(3):
            assert trials.ask(runtime, far=True).release == "r0"
        compare(runtime)
        runtime.watch.look()
        assert runtime.shelf.quarantined() == {shadow.sha256: "failures"}
        assert shadows(runtime) == {}
        assert trials.ask(runtime, far=True).release == "r0"
        assert runtime.counters()["requests_dropped"] == 0


def test_s8_a_shadow_that_does_not_end_is_ended_and_left(trials):
    shadow = trials.arm(1.0, 1.0, "hangs", mode="shadow")
    trials.plan(trials.arm(0.0), shadow)
    with trials.open() as runtime:
        trials.ask(runtime, far=True)
        compare(runtime)  # returns once the watch has ended the run
        runtime.watch.look()
        assert runtime.shelf.quarantined() == {shadow.sha256: "hung"}
        assert trials.ask(runtime, far=True).release == "r0"


def test_s8_a_shadow_is_proven_before_it_is_loaded(trials):
    shadow, proven = trials.arm(1.0, mode="shadow"), []
    arm = load_plan_arm(trials.shelf, "canary", shadow, None, proven.append)
    assert proven == [trials.shelf.path_of(shadow.sha256)]
    assert arm.shadow


def test_a_report_tells_how_the_answers_differ(trials):
    trials.plan(trials.arm(0.0), trials.arm(-0.4, mode="shadow"))
    with trials.open() as runtime:
        answers = [trials.ask(runtime, far=turn % 2 == 1).outputs[0] for turn in range(20)]
        compare(runtime)
        said = shadows(runtime)["r-0.4"]
    logits = np.log(np.array(answers) / (1 - np.array(answers)))
    others = 1 / (1 + np.exp(0.4 - logits))
    gaps = np.abs(others - answers)
    assert (said.family, said.against, said.rows, said.bad) == ("toy", "r0", 20, 0)
    assert said.dropped == 0
    assert said.agreed == ((others >= 0.5) == (np.array(answers) >= 0.5)).sum() == 10
    assert said.distance_sum == pytest.approx(gaps.sum(), abs=1e-4)
    assert said.distance_square_sum == pytest.approx((gaps**2).sum(), abs=1e-4)
    assert said.run_us_sum > 0


def test_rows_without_an_answer_count_as_far_away(trials):
    trials.plan(trials.arm(0.0), trials.arm(0.0001, 1.0, "nan", mode="shadow"))
    with trials.open() as runtime:
        for turn in range(20):
            trials.ask(runtime, far=turn % 2 == 1)
        compare(runtime)
        said = shadows(runtime)["r0.0001"]
    assert (said.rows, said.bad, said.agreed) == (20, 10, 10)
    assert said.distance_sum == pytest.approx(10, abs=0.01)


def test_a_shadow_has_the_windows_of_its_own_feature_spec(trials):
    spec = Spec.from_toml(OTHER_FEATURES)
    trials.plan(trials.arm(0.0), trials.arm(1.0, spec=spec, mode="shadow"))
    with trials.open() as runtime:
        given, _ = lived(trials, runtime)
        compare(runtime)
        said = shadows(runtime)["r1"]
    trials.again()
    trials.plan(trials.arm(1.0, spec=spec))
    with trials.open() as runtime:
        own, _ = lived(trials, runtime)
    gaps = [abs(a.outputs[0] - b.outputs[0]) for a, b in zip(given, own, strict=True)]
    assert (said.rows, said.bad) == (40, 0)
    assert said.distance_sum == pytest.approx(sum(gaps), abs=1e-4)


@pytest.mark.parametrize(
    ("golden", "one", "other", "same"),
    [
        ([[0.1], [0.9]], [0.6], [0.7], True),
        ([[0.1], [0.9]], [0.6], [0.4], False),
        ([[0.2, 0.8], [0.5, 0.5]], [0.6, 0.4], [0.9, 0.1], True),
        ([[0.2, 0.8], [0.5, 0.5]], [0.6, 0.4], [0.4, 0.6], False),
        ([[-10.0], [10.0]], [3.0], [3.9], True),
        ([[-10.0], [10.0]], [3.0], [4.1], False),
    ],
)
def test_what_agrees_depends_on_what_the_model_answers_with(golden, one, other, same):
    assert agreement(np.array(golden, "f4"))(one, other) is same
