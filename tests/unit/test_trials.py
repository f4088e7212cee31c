"""Releases on trial on a device: they cost a request nothing, and a bad one is left at once."""

from __future__ import annotations

import asyncio
import collections
import os

import msgspec
import pytest

from edge_runtime.errors import PackageError, TrustError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.health import BAD_LOOKS, SLOW_RUNS
from edge_runtime.rollout.plan import LocalGates

OFF = LocalGates(failures=0, slowdown=0.0)
OTHER_FEATURES = """
version = 1
[[features]]
name = "asked"
window = { over = "scheduled", statistic = "count", span_s = 3600.0 }
[[features]]
name = "distance"
field = "distance"
"""


def one(trials, runtime):
    return trials.ask(runtime, far=True)


def many(trials, runtime):
    return runtime.predict_many("toy", [trials.event(far=True)])[0]


def later(trials, runtime):
    return asyncio.run(runtime.predict_async("toy", trials.event(far=True)))


def served(runtime):
    return [arm.release for arm in runtime._members["toy"].pipeline.slot.resident]


def arms(runtime):
    """What the report says of each arm: release, requests, failures."""
    return {a.arm: (a.release, a.answered, a.failed) for a in runtime.report({}).arms}


@pytest.mark.parametrize("ask", [one, many, later])
@pytest.mark.parametrize("fault", ["fails", "nan", "shape"])
def test_r5_a_bad_trial_is_left_within_three_requests_that_the_stable_release_answers(
    trials, fault, ask
):
    canary = trials.arm(1.0, 9.0, fault)
    trials.plan(trials.arm(0.0), canary)
    with trials.open() as runtime:
        answers = [ask(trials, runtime) for _ in range(4)]
        assert [(a.release, a.arm) for a in answers] == [("r0", "stable")] * 4
        assert all(a.outputs == answers[0].outputs for a in answers)
        runtime.watch.look()
        assert served(runtime) == ["r0"]
        assert runtime.shelf.quarantined() == {canary.sha256: "failures"}
        assert runtime.counters()["requests_dropped"] == 0
        for record in trials.logged(runtime):
            assert [scored.release for scored in record.scored] == ["r0"]
            assert record.propensity == 1.0
        release, asked, failed = arms(runtime)["left"]
        assert (release, asked) == ("r1", failed)
        assert asked + arms(runtime)["stable"][1] == 4
        assert runtime.watch.statistics()["trials_left"] == 1
    with trials.open() as runtime:
        assert served(runtime) == ["r0"]


def test_r5_it_answers_no_more_from_the_third_failure_on_whatever_the_disk_says(trials):
    canary = trials.arm(1.0, 9.0, "fails")
    trials.plan(trials.arm(0.0), canary)
    path = trials.config.state_dir / "shelf" / "quarantine.json"
    in_the_way = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with trials.open() as runtime:
        in_the_way.mkdir()
        for _ in range(3):
            trials.ask(runtime, far=True)
        assert {trials.ask(runtime).release for _ in range(50)} == {"r0"}
        runtime.watch.look()
        assert served(runtime) == ["r0", "r1"]
        assert {trials.ask(runtime).release for _ in range(50)} == {"r0"}
        in_the_way.rmdir()
        runtime.watch.look()
        assert served(runtime) == ["r0"]
        assert canary.sha256 in runtime.shelf.quarantined()


def test_two_failures_and_an_answer_again_and_again_are_no_reason(trials):
    trials.plan(trials.arm(0.0), trials.arm(1.0, 9.0, "fails"))
    with trials.open() as runtime:
        for turn in range(60):
            trials.ask(runtime, far=turn % 3 != 0)
        runtime.watch.look()
        assert served(runtime) == ["r0", "r1"]
        answers = collections.Counter(record.scored[0].release for record in trials.logged(runtime))
        assert answers["r1"] > 0


def test_a_row_that_the_stable_release_cannot_answer_says_nothing_about_a_trial(trials):
    trials.plan(trials.arm(0.0, 1.0, "fails"), trials.arm(1.0, 1e-9, "nan"))
    with trials.open() as runtime:
        for _ in range(9):
            with pytest.raises(PackageError, match="run_failed"):
                trials.ask(runtime, far=True)
        runtime.watch.look()
        assert served(runtime) == ["r0", "r1"]
        assert arms(runtime)["stable"] == ("r0", 9, 9)
        assert trials.logged(runtime) == []


def test_a_trial_that_was_drawn_answers_where_the_stable_release_cannot(trials):
    trials.plan(trials.arm(0.0, 1.0, "fails"), trials.arm(1.0, 1e9))
    with trials.open() as runtime:
        assert trials.ask(runtime, far=True).release == "r1"
        [record] = trials.logged(runtime)
        assert [scored.release for scored in record.scored] == ["r1"]
        assert record.propensity == pytest.approx(1.0)


def test_the_stable_release_answers_what_it_would_have_answered_alone(trials):
    stable = trials.arm(0.0)
    trials.plan(stable, trials.arm(1.0, 1e9, "fails"), gates=OFF)
    with trials.open() as runtime:
        beside = [trials.ask(runtime, far=True).outputs for _ in range(5)]
    trials.plan(stable)
    with trials.open() as runtime:
        alone = [trials.ask(runtime, far=True).outputs for _ in range(5)]
    assert beside == alone


def test_the_logged_propensity_is_the_frequency_of_several_arms_and_of_fallbacks(trials):
    weights = {"r0": 0.5, "r1": 0.3, "r2": 0.2}
    trials.plan(
        trials.arm(0.0, 0.5), trials.arm(1.0, 0.3, "fails"), trials.arm(2.0, 0.2), gates=OFF
    )
    count = 3000
    with trials.open() as runtime:
        for turn in range(count):
            trials.ask(runtime, far=turn % 2 == 1)
        records = trials.logged(runtime)
        counted = arms(runtime)
    for far, expected in ((False, weights), (True, {"r0": 0.8, "r2": 0.2})):
        some = [r for r in records if (r.fields["distance"] > 500) == far]
        answered = collections.Counter(record.scored[0].release for record in some)
        said = {record.scored[0].release: record.propensity for record in some}
        assert said == {name: pytest.approx(chance) for name, chance in expected.items()}
        for name, chance in expected.items():
            assert answered[name] / len(some) == pytest.approx(chance, abs=0.04)
        assert {len(record.scored) for record in some} == {len(expected)}
    asked = {name: numbers[1:] for name, numbers in counted.items()}
    assert sum(answered for answered, _ in asked.values()) == count
    assert asked["canary"][0] == pytest.approx(0.3 * count, abs=0.04 * count)
    assert asked["canary"][1] == pytest.approx(0.15 * count, abs=0.03 * count)
    assert asked["stable"][1] == asked["trial2"][1] == 0


def test_each_arm_scores_with_the_windows_of_its_own_feature_spec(trials):
    spec = Spec.from_toml(OTHER_FEATURES)
    first, second = trials.arm(0.0), trials.arm(1.0, 1.0, spec=spec)
    trials.plan(first, second, gates=OFF)

    def lived(runtime):
        for turn in range(40):
            runtime.observe("toy", trials.event(kind="departed"))
            trials.ask(runtime, far=turn % 5 == 0)
        return trials.logged(runtime)

    with trials.open() as runtime:
        both = lived(runtime)
    alone = {}
    for arm in (first, second):
        trials.again()
        again = trials.arm(float(arm.release[1:]), **({} if arm is first else {"spec": spec}))
        trials.plan(again)
        with trials.open() as runtime:
            alone[arm.release] = lived(runtime)
    assert {record.scored[0].release for record in both} == {"r0", "r1"}
    for place, record in enumerate(both):
        assert {s.release: s.outputs for s in record.scored} == {
            name: records[place].scored[0].outputs for name, records in alone.items()
        }
        own = alone[record.scored[0].release][place]
        assert (record.spec, record.features) == (own.spec, own.features)


def test_a_trial_that_does_not_end_costs_one_request_a_moment_and_is_left(trials):
    canary = trials.arm(1.0, 9.0, "hangs")
    trials.plan(trials.arm(0.0), canary)
    with trials.open() as runtime:
        assert trials.ask(runtime).release in {"r0", "r1"}
        assert trials.ask(runtime, far=True).release == "r0"
        runtime.watch.look()
        assert served(runtime) == ["r0"]
        assert runtime.shelf.quarantined() == {canary.sha256: "hung"}


def test_a_trial_that_is_many_times_slower_is_left(trials):
    slow = trials.arm(1.0, 1.0, "slow")
    trials.plan(trials.arm(0.0), slow)
    with trials.open() as runtime:
        for _ in range(SLOW_RUNS):
            trials.ask(runtime)
        runtime.watch.look()
        assert runtime.shelf.quarantined() == {slow.sha256: "slowdown"}


def test_a_trial_that_takes_too_much_memory_never_answers(trials):
    large = trials.arm(1.0, 1e9, ballast=3000)
    trials.plan(trials.arm(0.0), large, gates=LocalGates(memory_mb=8.0))
    with trials.open() as runtime:
        assert trials.ask(runtime).release == "r0"
        runtime.watch.look()
        assert runtime.shelf.quarantined() == {large.sha256: "memory"}
        assert served(runtime) == ["r0"]


def test_of_several_on_trial_only_the_bad_one_is_left(trials):
    bad = trials.arm(1.0, 1.0, "nan")
    plan = trials.plan(trials.arm(0.0), bad, trials.arm(2.0, 9.0))
    with trials.open() as runtime:
        for _ in range(3):
            trials.ask(runtime, far=True)
        runtime.watch.look()
        assert served(runtime) == ["r0", "r2"]
        assert runtime.current("toy").trials == [plan.others[0]]
        assert {trials.ask(runtime, far=True).release for _ in range(30)} == {"r0", "r2"}
    with trials.open() as runtime:
        assert served(runtime) == ["r0", "r2"]


def test_what_was_left_does_not_come_back_by_a_swap(trials):
    canary = trials.arm(1.0, 9.0, "fails")
    plan = trials.plan(trials.arm(0.0), canary)
    with trials.open() as runtime:
        loaded = [
            load_arm(trials.shelf.path_of(arm.sha256), arm.sha256, name, arm.release, arm.weight)
            for name, arm in zip(("stable", "canary"), plan.arms, strict=True)
        ]
        for _ in range(3):
            trials.ask(runtime, far=True)
        runtime.watch.look()
        with pytest.raises(TrustError, match="release_quarantined"):
            runtime.swap("toy", loaded, plan)
        assert served(runtime) == ["r0"]


def test_counts_go_on_when_a_newer_plan_names_the_same_release_again(trials):
    stable, canary = trials.arm(0.0), trials.arm(1.0, 1.0)
    trials.plan(stable, canary)
    with trials.open() as runtime:
        for _ in range(20):
            trials.ask(runtime)
        before = arms(runtime)
        plan = trials.plan(stable, canary)
        loaded = [
            load_arm(trials.shelf.path_of(arm.sha256), arm.sha256, name, arm.release, arm.weight)
            for name, arm in zip(("stable", "canary"), plan.arms, strict=True)
        ]
        runtime.swap("toy", loaded, plan)
        assert arms(runtime) == before
        assert before["stable"][1] + before["canary"][1] == 20


def test_where_the_stable_release_fails_the_fallback_of_the_plan_serves(trials):
    before, other = trials.arm(0.0), trials.arm(2.0)
    trials.plan(before)
    trials.plan(trials.arm(1.0), fallback=other)
    with trials.open() as runtime:
        assert runtime.rollback("toy", "it was wrong") == "r2"
        assert trials.ask(runtime).release == "r2"
        assert runtime.rollback("toy", "that too") == "r0"


def test_a_fallback_that_is_not_on_the_shelf_gives_way_to_what_ran_before(trials):
    trials.plan(trials.arm(0.0))
    gone = msgspec.structs.replace(trials.arm(2.0), sha256="0" * 64)
    trials.plan(trials.arm(1.0), fallback=gone)
    with trials.open() as runtime:
        assert runtime.rollback("toy", "it was wrong") == "r0"


def test_reports_are_numbered(trials):
    trials.plan(trials.arm(0.0))
    with trials.open() as runtime:
        assert [runtime.report({}).number for _ in range(3)] == [1, 2, 3]


def test_a_stable_release_that_gives_bad_answers_alone_is_left_itself_not_its_trial(trials):
    before, bad, trial = trials.arm(0.0), trials.arm(1.0, 1.0, "nan"), trials.arm(2.0, 1e-9)
    trials.plan(before)
    trials.plan(bad, trial)
    with trials.open() as runtime:
        for _ in range(BAD_LOOKS):
            trials.ask(runtime, far=True)
            runtime.watch.look_at_stable()
        assert served(runtime) == ["r0"]
        assert runtime.shelf.quarantined() == {bad.sha256: "rolled_back"}
