"""The pipeline: from event to answer, its event clock, and its restart."""

from __future__ import annotations

import math
import types

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.clock import ManualClock
from edge_runtime.errors import RequestError
from edge_runtime.inference.pipeline import Pipeline, score_batch
from edge_runtime.inference.scoring import score, score_many
from edge_runtime.inference.slot import load_arm

NOON = 1.36e9
ASK = {"carrier": "AA", "distance": 100}
SEEN = {"carrier": "AA", "delay": 30.0}


@pytest.fixture
def load(write_package):
    def load(bias=0.0, name="stable", **options):
        return load_arm(*write_package(bias=bias, **options), name, f"r{bias:g}", 0.5)

    return load


@pytest.fixture
def pipeline(load):
    pipeline = Pipeline("toy", ManualClock(NOON))
    pipeline.swap([load()])
    return pipeline


def ask(pipeline, kind, time_s, fields):
    """The arms, what each was given, and what each answers."""
    arms = pipeline.admitted(kind, time_s, fields)
    rows = pipeline.rows(time_s, fields)
    vectors = [np.frombuffer(row, "<f4") for row in rows]
    return types.SimpleNamespace(arms=arms, vectors=vectors, outputs=score(arms, rows)[0])


def predict(pipeline, kind, time_s, fields):
    answer = ask(pipeline, kind, time_s, fields)
    pipeline.move(kind, time_s, fields)
    return answer


def observe(pipeline, kind, time_s, fields):
    pipeline.admit(kind, time_s, fields)
    pipeline.move(kind, time_s, fields)


def code(call, *arguments):
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    return caught.value.code


def test_before_the_first_release_there_is_a_named_error():
    pipeline = Pipeline("toy")
    assert code(ask, pipeline, "scheduled", NOON, ASK) == "no_release"
    assert code(pipeline.admit, "departed", NOON, SEEN) == "no_release"


def test_after_the_release_is_withdrawn_it_is_named_again(pipeline):
    pipeline.swap([])
    assert code(ask, pipeline, "scheduled", NOON, ASK) == "no_release"


def test_an_answer_comes_of_what_the_windows_know(pipeline):
    observe(pipeline, "departed", NOON - 60, SEEN)
    answer = predict(pipeline, "scheduled", NOON, ASK)
    assert answer.vectors[0].tolist() == [1, 100, 1, 30, 30]
    [[output]] = answer.outputs
    assert output == pytest.approx(1 / (1 + math.exp(-0.162)), abs=1e-6)


def test_every_arm_scores(pipeline, load):
    pipeline.swap([load(0.0), load(1.0, "canary")])
    answer = predict(pipeline, "scheduled", NOON, ASK)
    assert [arm.release for arm in answer.arms] == ["r0", "r1"]
    pairs = zip(answer.arms, answer.vectors, strict=True)
    assert answer.outputs == [arm.runner.run(row[np.newaxis]).tolist()[0] for arm, row in pairs]
    assert answer.outputs[0] != answer.outputs[1]


def test_many_are_scored_as_each_alone_is(pipeline, load):
    pipeline.swap([load(0.0), load(1.0, "canary")])
    arms = pipeline.slot.arms
    many = [pipeline.rows(NOON, ASK | {"distance": miles}) for miles in range(7)]
    together = [answers for answers, _, _ in score_many(arms, many)]
    np.testing.assert_allclose(together, [score(arms, rows)[0] for rows in many], atol=1e-6)
    assert len({answer[0][0] for answer in together}) == len(many)


def test_a_kind_that_is_only_observed_gets_no_answer(pipeline):
    assert code(ask, pipeline, "departed", NOON, SEEN) == "not_predicted"


def test_an_answer_moves_nothing_until_it_is_told_to(pipeline):
    observe(pipeline, "departed", NOON, SEEN)
    before, clock = pipeline.snapshot(), pipeline.newest_s
    ask(pipeline, "scheduled", NOON + 5, ASK)
    pipeline.admit("departed", NOON + 5, SEEN)
    assert (pipeline.snapshot(), pipeline.newest_s) == (before, clock)
    pipeline.move("departed", NOON + 5, SEEN)
    assert pipeline.newest_s == NOON + 5
    assert pipeline.snapshot() != before


def test_what_is_refused_leaves_no_trace(pipeline):
    observe(pipeline, "departed", NOON, SEEN)
    before = pipeline.snapshot()
    far = NOON + 90_000
    assert code(pipeline.admit, "departed", NOON, {"carrier": "AA"}) == "missing_field"
    assert code(pipeline.admit, "departed", far, SEEN) == "event_from_future"
    assert code(ask, pipeline, "scheduled", far, ASK) == "event_from_future"
    assert code(ask, pipeline, "departed", NOON + 5, SEEN) == "not_predicted"
    assert code(ask, pipeline, "scheduled", NOON, ASK | {"x": 1}) == "unknown_field"
    assert pipeline.snapshot() == before


def test_an_event_too_late_is_answered_and_counted_but_moves_no_window(pipeline):
    observe(pipeline, "departed", NOON, SEEN)
    before = pipeline.snapshot()
    observe(pipeline, "departed", NOON - 7201, SEEN)
    predict(pipeline, "scheduled", NOON - 7201, ASK)
    assert pipeline.snapshot() == before
    assert pipeline.statistics()["late_events"] == 2
    observe(pipeline, "departed", NOON - 7200, SEEN)
    assert pipeline.statistics()["late_events"] == 2
    assert pipeline.statistics()["entries"] > 2


def test_on_the_event_clock_a_silence_may_be_long_if_it_really_was(load):
    clock = ManualClock(NOON)
    pipeline = Pipeline("toy", clock)
    pipeline.swap([load()])
    observe(pipeline, "departed", NOON, SEEN)
    assert code(pipeline.admit, "departed", NOON + 100_000, SEEN) == "event_from_future"
    clock.advance(20_000)
    observe(pipeline, "departed", NOON + 100_000, SEEN)


def test_on_the_event_clock_the_first_event_after_a_restart_may_be_far_ahead(pipeline):
    observe(pipeline, "departed", NOON, SEEN)
    again = Pipeline("toy", ManualClock(NOON))
    again.swap(pipeline.slot.arms)
    again.restore(pipeline.snapshot())
    observe(again, "departed", NOON + 1e6, SEEN)
    assert code(again.admit, "departed", NOON + 2e6, SEEN) == "event_from_future"


def test_on_the_wall_clock_an_event_may_be_ahead_by_the_skew_only(load, toy_interface):
    clock = ManualClock(NOON)
    pipeline = Pipeline("toy", clock)
    wall = msgspec.structs.replace(toy_interface, clock="wall", skew_s_max=5.0)
    pipeline.swap([load(interface=wall)])
    observe(pipeline, "departed", NOON + 5, SEEN)
    assert code(pipeline.admit, "departed", NOON + 5.1, SEEN) == "event_from_future"
    clock.advance(1.0)
    observe(pipeline, "departed", NOON + 5.1, SEEN)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(-9000, 5000), st.floats(-60, 300)), max_size=30
    ),
    cut=st.integers(0, 30),
    armed=st.booleans(),
)
def test_restore_and_replay_give_the_same_bits_as_never_stopping(pipeline, steps, cut, armed):
    arms = pipeline.slot.arms
    live, again = Pipeline("toy", ManualClock(NOON)), Pipeline("toy", ManualClock(NOON + 1e6))
    live.swap(arms)
    if armed:
        again.swap(arms)
    again.restore(live.snapshot())
    for at, (asks, step_s, delay) in enumerate(steps):
        if at == cut:
            again.restore(live.snapshot())
        kind, fields = ("scheduled", ASK) if asks else ("departed", SEEN | {"delay": delay})
        time_s = max(live.newest_s, NOON) + step_s
        if asks:
            predict(live, kind, time_s, fields)
        else:
            observe(live, kind, time_s, fields)
        again.replay(kind, time_s, fields)
    assert again.snapshot() == live.snapshot()
    again.swap(arms)
    asked = "scheduled", live.newest_s if steps else NOON, ASK
    assert predict(again, *asked).vectors[0].tobytes() == predict(live, *asked).vectors[0].tobytes()


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x94\x02\x00\x00\x90"])
def test_garbage_is_no_snapshot_and_changes_nothing(pipeline, data):
    observe(pipeline, "departed", NOON, SEEN)
    before = pipeline.snapshot()
    assert code(pipeline.restore, data) == "bad_snapshot"
    assert pipeline.snapshot() == before


def test_any_damage_to_a_snapshot_is_refused_or_restores_whole_windows(pipeline):
    observe(pipeline, "departed", NOON, SEEN)
    whole = pipeline.snapshot()
    for cut in range(len(whole)):
        assert code(pipeline.restore, whole[:cut]) == "bad_snapshot"
    assert pipeline.snapshot() == whole


def test_windows_go_on_across_a_swap_and_a_change_of_features(pipeline, load, toy_spec):
    observe(pipeline, "departed", NOON, SEEN)
    pipeline.swap([load(1.0)])
    assert predict(pipeline, "scheduled", NOON, ASK).vectors[0].tolist() == [1, 100, 1, 30, 30]
    narrow = toy_spec.subset(["distance", "delay_1h"])
    pipeline.swap([load(1.0), load(2.0, "canary", spec=narrow)])
    answer = predict(pipeline, "scheduled", NOON, ASK)
    assert [vector.tolist() for vector in answer.vectors] == [[1, 100, 1, 30, 30], [100, 30]]
    again = Pipeline("toy")
    again.swap([load(2.0, spec=narrow)])
    again.restore(pipeline.snapshot())
    assert predict(again, "scheduled", NOON, ASK).vectors[0].tolist() == [100, 30]


def test_one_row_in_place_is_answered_as_a_batch_of_one(pipeline, toy_spec):
    runner = pipeline.slot.arms[0].runner
    rows = np.random.default_rng(7).normal(size=(50, toy_spec.size)).astype(np.float32) * 100
    kept = [runner.answer(row.tobytes()) for row in rows]
    assert kept == [runner.run(row[np.newaxis]).tolist()[0] for row in rows]
    assert len({answer[0] for answer in kept}) == len(rows)


def test_a_batch_is_scored_as_its_rows_are(pipeline, toy_spec):
    runner = pipeline.slot.arms[0].runner
    rows = np.random.default_rng(7).normal(size=(2500, toy_spec.size)).astype(np.float32) * 100
    alone = np.concatenate([runner.run(row[np.newaxis]) for row in rows])
    np.testing.assert_allclose(score_batch(runner, rows), alone, atol=1e-6)
    assert score_batch(runner, rows[:0]).shape == (0, 1)
