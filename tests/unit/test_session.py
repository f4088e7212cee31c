"""Sessions over a real runtime: what they answer, learn, log, and forget."""

from __future__ import annotations

import asyncio
import base64
import math
import os
import time
from collections import Counter

import msgspec
import numpy as np
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, SessionsConfig, local_config
from edge_runtime.errors import PackageError, RequestError
from edge_runtime.inference.slot import load_arm
from edge_runtime.personal.ground import Ground
from edge_runtime.personal.odds import shifted
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec

NOW_S = 1_360_000_000.0
KEY = "ada-lovelace-0815"


def scheduled(distance=998.0, carrier="UA", time_s=NOW_S):
    return Event("scheduled", time_s, {"carrier": carrier, "distance": distance})


def policy_of(explore=0.0, optimism=0.0, region=2.0, width=2, spread=1.0):
    eye = spread * np.eye(width + 1, dtype=np.float32)
    prior = Prior("binary", np.zeros(width + 1, np.float32), eye, region, norm_max=1e4)
    return Policy(prior, explore, optimism)


@pytest.fixture
def clock():
    return ManualClock(NOW_S)


@pytest.fixture
def open_runtime(tmp_path, plan_of, clock):
    """`open_runtime(*arms)` opens a device that serves them."""
    opened = []

    def open_runtime(*arms, state="state", **sessions):
        config = EdgeConfig(
            device="EWR",
            families=["toy"],
            state_dir=tmp_path / state,
            socket=tmp_path / "edge.sock",
            sessions=SessionsConfig(**sessions),
        )
        runtime = Runtime.open(config, clock=clock, step=lambda: 1)
        opened.append(runtime)
        if arms:
            runtime.swap("toy", arms, plan_of(*arms))
        return runtime

    yield open_runtime
    for runtime in opened:
        runtime.close()


@pytest.fixture
def load(write_package):
    def load(bias=0.0, name="stable", weight=1.0, policy=None, **package):
        path, _ = write_package(bias=bias, policy=policy, **package)
        return load_arm(path, None, name, f"r{bias:g}", weight)

    return load


def logged(runtime):
    asyncio.run(runtime.log.wait_durable("event", runtime.log.handed_out("event")))
    data = [data for _, _, data in runtime.log.tail("event", 0, 0)]
    return data, [codec.decode_record(each) for each in data]


def until(condition, within_s=30.0):
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        os.sched_yield()


def taught(session, label=1.0, times=5):
    for _ in range(times):
        session.label(session.predict(scheduled()).id, label)


def test_before_its_first_label_a_session_answers_as_the_model_does(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))

    within, without = (
        runtime.session("toy", KEY).predict(scheduled()),
        runtime.predict("toy", scheduled()),
    )

    assert within.outputs == within.base == without.outputs
    assert not within.adapted
    assert runtime.statistics()["sessions"]["open"] == 0


def test_labels_move_the_answer_and_the_log_keeps_the_models_own(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)
    base = session.predict(scheduled()).outputs

    taught(session)
    answer = session.predict(scheduled())

    assert answer.adapted
    assert answer.base == base
    assert answer.outputs[0] > base[0] + 0.05
    data, records = logged(runtime)
    assert [record.scored[0].outputs for record in records] == [base] * len(records)
    assert [record.adapted for record in records] == [False, False, True, True, True, True, True]
    assert not any(KEY.encode() in each for each in data)
    assert KEY not in str(runtime.statistics())


def test_one_session_never_touches_another(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))
    taught(runtime.session("toy", "grace"), times=2)
    before = runtime.session("toy", "grace").predict(scheduled()).outputs

    for number in range(200):
        enemy = runtime.session("toy", KEY)
        enemy.label(enemy.predict(scheduled()).id, number % 2)

    assert runtime.session("toy", "grace").predict(scheduled()).outputs == before
    assert not runtime.session("toy", "nobody").predict(scheduled()).adapted


def test_a_label_of_another_session_is_refused_and_not_logged(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))
    answer = runtime.session("toy", "grace").predict(scheduled())

    with pytest.raises(RequestError) as caught:
        runtime.session("toy", KEY).label(answer.id, 1)

    assert caught.value.code == "other_session"
    assert runtime.log.handed_out("label") == 0
    assert runtime.session("toy", "grace").label(answer.id, 1).adapted


def test_a_session_learns_the_first_final_label_of_an_answer(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)
    answer = session.predict(scheduled())

    learned = [
        session.label(answer.id, 1, final=False).adapted,
        session.label(answer.id, 1).adapted,
        session.label(answer.id, 0).adapted,
    ]

    assert learned == [False, True, False]
    assert session.explain().labels == 1
    assert runtime.log.handed_out("label") == 3


def test_what_is_answered_outside_of_a_session_teaches_none(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)

    labelled = session.label(runtime.predict("toy", scheduled()).id, 1)

    assert labelled == type(labelled)(1, adapted=False)
    assert session.explain().labels == 0


def test_reset_and_close_and_forget(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))
    first, second = runtime.session("toy", KEY), runtime.session("toy", "grace")
    taught(first)
    taught(second)
    pending = first.predict(scheduled())

    first.reset()
    assert not first.predict(scheduled()).adapted
    assert not first.label(pending.id, 1).adapted
    first.close()
    assert runtime.statistics()["sessions"]["open"] == 1
    assert runtime.forget_sessions() == 1
    assert not second.predict(scheduled()).adapted
    assert runtime.statistics()["sessions"]["wiped"] == 1


def test_a_model_without_a_policy_answers_and_learns_nothing(open_runtime, load):
    runtime = open_runtime(load())
    session = runtime.session("toy", KEY)
    answer = session.predict(scheduled())

    assert not session.label(answer.id, 1).adapted
    assert [each.index for each in session.rank(scheduled(), [{"distance": 1.0}], 3)] == [0]
    assert session.explain().with_model


def test_bad_keys_and_unknown_families_are_refused(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))

    for family, key, code in (
        ("toy", "", "bad_session_key"),
        ("toy", "x" * 257, "bad_session_key"),
        ("tyo", "x", "unknown_family"),
    ):
        with pytest.raises(RequestError) as caught:
            runtime.session(family, key)
        assert caught.value.code == code


def test_in_a_trial_the_shift_of_the_stable_arm_moves_whichever_answers(open_runtime, load):
    arms = load(policy=policy_of(), weight=0.5), load(0.3, "canary", 0.5, policy=policy_of())
    runtime = open_runtime(*arms)
    session = runtime.session("toy", KEY)
    taught(session)

    answers = [session.predict(scheduled()) for _ in range(40)]

    def odds(chance):
        return np.log(chance / (1 - chance))

    shifts = {
        arm: {
            round(float(odds(each.outputs[0]) - odds(each.base[0])), 4)
            for each in answers
            if each.arm == arm
        }
        for arm in ("stable", "canary")
    }
    assert len(shifts["stable"]) == 1
    assert shifts["stable"] == shifts["canary"]


CANDIDATES = [{"distance": 100.0 * number} for number in range(20)]


def test_only_what_is_shown_is_logged_with_place_and_chance(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of(explore=0.2)))
    session = runtime.session("toy", KEY)

    ranked = session.rank(Event("scheduled", NOW_S, {"carrier": "UA"}), CANDIDATES, 5)

    _, records = logged(runtime)
    assert len({each.index for each in ranked}) == len(records) == 5
    assert [record.shown.place for record in records] == [1, 2, 3, 4, 5]
    assert {record.shown.of for record in records} == {20}
    assert [record.shown.chance for record in records] == [each.chance for each in ranked]
    assert [record.fields["distance"] for record in records] == [
        CANDIDATES[each.index]["distance"] for each in ranked
    ]
    assert [record.scored[0].outputs[0] for record in records] == [each.base for each in ranked]


def test_the_chance_is_how_often_a_candidate_stands_there(open_runtime, load):
    explore, rounds = 0.3, 600
    runtime = open_runtime(load(policy=policy_of(explore=explore)))
    session = runtime.session("toy", KEY)
    event = Event("scheduled", NOW_S, {"carrier": "UA"})

    tops = [session.rank(event, CANDIDATES[:5], 1)[0] for _ in range(rounds)]

    counted = Counter(each.index for each in tops)
    best = counted.most_common(1)[0][0]
    chances = {each.index: each.chance for each in tops}
    assert chances[best] == pytest.approx(1 - explore + explore / 5)
    assert sum(chances.values()) == pytest.approx(1.0)
    for index, chance in chances.items():
        assert counted[index] / rounds == pytest.approx(chance, abs=0.06)


def test_labels_of_what_was_shown_move_the_ranking(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of(spread=10.0)))
    session = runtime.session("toy", KEY)
    event = Event("scheduled", NOW_S, {"carrier": "UA"})
    before = session.rank(event, CANDIDATES, 20)
    assert before[0].index == 19

    for each in before:
        session.label(each.id, float(each.index < 8))
    after = session.rank(event, CANDIDATES, 20)

    assert after[0].index < 8
    assert after[-1].index >= 8
    assert [each.base for each in sorted(after, key=lambda e: e.index)] == [
        each.base for each in sorted(before, key=lambda e: e.index)
    ]


def test_given_features_answer_as_those_of_the_windows_do(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)
    event = Event("scheduled", NOW_S, {"carrier": "UA"})
    spec = runtime.resident("toy")[0].info.spec
    engine = runtime._members["toy"].pipeline
    rows = [engine.rows(NOW_S, {"carrier": "UA", **each})[0] for each in CANDIDATES]
    features = np.frombuffer(b"".join(rows), "<f4").reshape(-1, spec.size)

    given = session.rank(event, CANDIDATES, 4, features)
    asked = session.rank(event, CANDIDATES, 4)

    assert [(each.index, each.score) for each in given] == [
        (each.index, each.score) for each in asked
    ]
    assert len({record.features for record in logged(runtime)[1]}) == 4


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (([], 1), "no_candidates"),
        ((CANDIDATES, 0), "no_candidates"),
        ((CANDIDATES * 60, 1), "too_many_candidates"),
        (([*CANDIDATES, {"distance": "far"}], 1), "wrong_type"),
        (([*CANDIDATES, {"distance": float("nan")}], 1), "not_finite"),
        ((CANDIDATES, 1, np.zeros((3, 2), np.float32)), "wrong_shape"),
        ((CANDIDATES[:2], 1, [[1.0, 2.0], [1.0]]), "wrong_shape"),
        ((CANDIDATES[:1], 1, [["far"]]), "wrong_shape"),
        ((CANDIDATES[:1], 1, [[{}]]), "wrong_shape"),
        ((CANDIDATES[:1], 1, [[10**400]]), "wrong_shape"),
        (([{"distanec": 1.0}], 1, np.zeros((1, 5), np.float32)), "unknown_field"),
    ],
)
def test_a_ranking_that_is_refused_leaves_no_trace(open_runtime, load, asked, code):
    runtime = open_runtime(load(policy=policy_of()))
    session, event = runtime.session("toy", KEY), Event("scheduled", NOW_S, {"carrier": "UA"})

    with pytest.raises(RequestError) as caught:
        session.rank(event, *asked)

    assert caught.value.code == code
    assert runtime.log.handed_out("event") == 0
    assert runtime.counters()["request_errors"] == 1


def test_a_new_release_takes_the_sessions_over(open_runtime, load, plan_of):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)
    taught(session)
    before = session.predict(scheduled())
    pending = session.predict(scheduled())
    arm = load(0.1, policy=policy_of(spread=1.01), turn=-1.0)

    runtime.swap("toy", [arm], plan_of(arm))
    after = session.predict(scheduled())

    assert session.label(pending.id, 1).adapted
    assert session.explain().labels == 6
    assert after.outputs[0] - after.base[0] == pytest.approx(
        before.outputs[0] - before.base[0], abs=0.02
    )


def test_sessions_sleep_where_the_release_knows_none_and_wake_again(open_runtime, load, plan_of):
    arms = load(policy=policy_of()), load(0.1)
    runtime = open_runtime(arms[0])
    session = runtime.session("toy", KEY)
    taught(session)
    before = session.predict(scheduled()).outputs

    runtime.swap("toy", arms[1:], plan_of(arms[1]))
    assert not session.predict(scheduled()).adapted
    runtime.swap("toy", arms[:1], plan_of(arms[0]))

    assert session.predict(scheduled()).outputs == before


def test_open_sessions_are_moved_without_being_asked(open_runtime, load, plan_of):
    runtime = open_runtime(load(policy=policy_of()))
    for number in range(50):
        taught(runtime.session("toy", f"user-{number}"), times=3)
    arm = load(0.1, policy=policy_of(spread=1.01))

    runtime.swap("toy", [arm], plan_of(arm))
    until(lambda: runtime.statistics()["sessions"]["rebased"] == 50)


def test_sessions_that_are_kept_survive_a_restart_and_lie_there_no_longer(tmp_path, write_package):
    path, _ = write_package(policy=policy_of())
    config = msgspec.structs.replace(
        local_config(path, "toy", tmp_path / "state"), sessions=SessionsConfig(keep=True)
    )
    kept = tmp_path / "state" / "sessions"
    with Runtime.open(config) as runtime:
        session = runtime.session("toy", KEY)
        taught(session)
        before = session.predict(scheduled()).outputs
    assert kept.stat().st_mode & 0o777 == 0o600

    with Runtime.open(config) as again:
        assert not kept.exists()
        assert again.session("toy", KEY).predict(scheduled()).outputs == before


def test_kept_sessions_that_are_spoilt_cost_only_themselves(tmp_path, write_package):
    path, _ = write_package(policy=policy_of())
    config = local_config(path, "toy", tmp_path / "state")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "sessions").write_bytes(b"HWSE garbage")

    with Runtime.open(config) as runtime:
        assert not runtime.session("toy", KEY).predict(scheduled()).adapted
    assert not (tmp_path / "state" / "sessions").exists()


def test_without_keep_nothing_of_a_session_is_written(open_runtime, load, tmp_path):
    runtime = open_runtime(load(policy=policy_of()))
    taught(runtime.session("toy", KEY))
    runtime.close()

    for path in (tmp_path / "state").rglob("*"):
        assert path.name != "sessions"
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_unused_sessions_end_with_the_next_report(open_runtime, load, clock):
    runtime = open_runtime(load(policy=policy_of()), ttl_s=60.0)
    taught(runtime.session("toy", KEY))

    clock.advance(61)
    runtime.report({})

    assert runtime.statistics()["sessions"]["open"] == 0


def test_a_heavy_model_is_asked_on_its_own_thread(open_runtime, load):
    arm = load(policy=policy_of())
    arm.runner.run_us = 1e6
    runtime = open_runtime(arm)
    session = runtime.session("toy", KEY)

    async def converse():
        answer = await session.predict_async(scheduled())
        session.label(answer.id, 1)
        return await session.predict_async(scheduled()), await session.rank_async(
            scheduled(), CANDIDATES, 3
        )

    answer, ranked = asyncio.run(converse())

    assert answer.adapted
    assert len(ranked) == 3
    assert msgspec.json.encode(ranked)


@pytest.mark.parametrize("key", ["\ud800", "a\udfffz", b"bytes", 7])
def test_a_key_that_is_no_text_is_refused(open_runtime, load, key):
    runtime = open_runtime(load(policy=policy_of()))

    with pytest.raises(RequestError) as caught:
        runtime.session("toy", key)

    assert caught.value.code == "bad_session_key"


def test_any_text_is_a_key_that_survives_a_restart(tmp_path, write_package):
    path, _ = write_package(policy=policy_of())
    config = msgspec.structs.replace(
        local_config(path, "toy", tmp_path / "state"), sessions=SessionsConfig(keep=True)
    )
    keys = ["\0", "\U0001f9a9" * 256, "a\nb", "\u202e"]
    with Runtime.open(config) as runtime:
        for key in keys:
            taught(runtime.session("toy", key))

    with Runtime.open(config) as again:
        assert all(again.session("toy", key).predict(scheduled()).adapted for key in keys)


def test_a_reset_counts_where_sessions_sleep(open_runtime, load, plan_of):
    arms = load(policy=policy_of()), load(0.1)
    runtime = open_runtime(arms[0])
    session = runtime.session("toy", KEY)
    taught(session)

    runtime.swap("toy", arms[1:], plan_of(arms[1]))
    session.reset()
    runtime.swap("toy", arms[:1], plan_of(arms[0]))

    assert not session.predict(scheduled()).adapted


def test_a_new_model_with_the_same_prior_takes_the_sessions_over(open_runtime, load, plan_of):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)
    taught(session)
    before = session.predict(scheduled())
    arm = load(0.1, policy=policy_of(), turn=-1.0)

    runtime.swap("toy", [arm], plan_of(arm))
    after = session.predict(scheduled())

    assert runtime.statistics()["sessions"]["rebased"] == 1
    assert after.outputs[0] - after.base[0] == pytest.approx(
        before.outputs[0] - before.base[0], abs=0.02
    )


def test_sessions_of_a_wider_release_keep_within_their_bytes(open_runtime, load, plan_of):
    runtime = open_runtime(load(policy=policy_of()), bytes_max_mb=1)
    for number in range(100):
        taught(runtime.session("toy", f"user-{number}"), times=1)
    arm = load(0.1, policy=policy_of(width=200))

    runtime.swap("toy", [arm], plan_of(arm))

    def told():
        return runtime.statistics()["sessions"]

    until(lambda: told()["open"] * 201 * 201 * 4 < told()["bytes"])
    assert 0 < told()["bytes"] <= 1 << 20


def test_what_cannot_be_read_of_kept_sessions_costs_only_them(tmp_path, write_package):
    path, _ = write_package(policy=policy_of())
    config = local_config(path, "toy", tmp_path / "state")
    (tmp_path / "state" / "sessions").mkdir(parents=True)

    with Runtime.open(config) as runtime:
        assert not runtime.session("toy", KEY).predict(scheduled()).adapted


def test_kept_sessions_beyond_what_may_be_open_are_not_read_in_full(tmp_path, write_package):
    path, _ = write_package(policy=policy_of())
    config = msgspec.structs.replace(
        local_config(path, "toy", tmp_path / "state"), sessions=SessionsConfig(bytes_max_mb=1)
    )
    (tmp_path / "state").mkdir()
    with (tmp_path / "state" / "sessions").open("wb") as file:
        file.truncate(1 << 36)

    with Runtime.open(config) as runtime:
        assert not runtime.session("toy", KEY).predict(scheduled()).adapted
    assert not (tmp_path / "state" / "sessions").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_candidates_rows_that_are_not_finite_are_refused(open_runtime, load, value):
    runtime = open_runtime(load(policy=policy_of()))
    session, event = runtime.session("toy", KEY), Event("scheduled", NOW_S, {"carrier": "UA"})
    features = np.zeros((20, runtime.resident("toy")[0].runner.features))
    features[7, 1] = value

    with pytest.raises(RequestError) as caught:
        session.rank(event, CANDIDATES, 3, features)

    assert caught.value.code == "not_finite"
    assert runtime.log.handed_out("event") == 0


def test_labels_that_are_refused_are_counted(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)
    answer = runtime.session("toy", "grace").predict(scheduled())

    for prediction_id, value in ((answer.id, 1), ("EWR.1.99", 1), (answer.id, float("nan"))):
        with pytest.raises(RequestError):
            session.label(prediction_id, value)

    assert runtime.counters()["request_errors"] == 3


def test_a_policy_needs_a_model_of_one_number(load, tmp_path):
    import onnx

    arm_path = tmp_path / "two.onnx"
    load(policy=policy_of())
    model = onnx.load(next(tmp_path.glob("*.onnx")))
    model.graph.node.append(
        onnx.helper.make_node("Concat", ["probability1"] * 2, ["probability"], axis=1)
    )
    next(n for n in model.graph.node if n.op_type == "Sigmoid").output[0] = "probability1"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    golden = next(each for each in model.metadata_props if each.key == "headwater.golden")
    told = msgspec.json.decode(golden.value)
    answers = np.frombuffer(base64.b64decode(told["outputs_b64"]), "<f4").repeat(2)
    told["outputs_b64"] = base64.b64encode(answers.tobytes()).decode()
    golden.value = msgspec.json.encode(told).decode()
    onnx.save(model, arm_path)

    with pytest.raises(PackageError) as caught:
        load_arm(arm_path, None, "stable", "r", 1.0)

    assert caught.value.code == "wrong_signature"
    assert "sessions" in str(caught.value)


@pytest.mark.parametrize("base", [float("nan"), 0.0, 1.0])
def test_a_shifted_answer_is_a_probability_or_none_at_all(base):
    moved = shifted("binary", base, 2.0)

    assert math.isnan(moved) if math.isnan(base) else abs(moved - base) < 1e-11


def test_embeddings_beyond_float32_leave_a_ranking_whole(open_runtime, load):
    runtime = open_runtime(load(policy=policy_of(optimism=1.0), turn=1e6))
    session, event = runtime.session("toy", KEY), Event("scheduled", NOW_S, {"carrier": "UA"})
    session.label(session.predict(scheduled()).id, 1)
    features = np.zeros((20, runtime.resident("toy")[0].runner.features), np.float32)
    features[3, :2] = 3e38, -3e38

    ranked = session.rank(event, CANDIDATES, 20, features)

    assert sorted(each.index for each in ranked) == list(range(20))
    assert all(0 <= each.score <= 1 for each in ranked)


def test_sessions_that_are_too_large_are_warned_of_once(open_runtime, load, caplog):
    runtime = open_runtime(load(policy=policy_of(width=500)), bytes_max_mb=1)
    session = runtime.session("toy", KEY)

    taught(session, times=3)

    warned = [each for each in caplog.messages if "could not learn" in each]
    assert len(warned) == 1
    assert KEY not in warned[0]
    assert runtime.log.handed_out("label") == 3


@pytest.mark.parametrize("label", [7.0, -0.5])
def test_a_label_that_can_teach_nothing_opens_no_session(open_runtime, load, label):
    runtime = open_runtime(load(policy=policy_of()), count_max=1)
    first, second = runtime.session("toy", KEY), runtime.session("toy", "grace")
    taught(first, times=1)

    assert not second.label(second.predict(scheduled()).id, label).adapted
    assert not first.label(first.predict(scheduled()).id, label).adapted

    assert runtime.statistics()["sessions"]["evicted"] == 0
    assert (first.explain().labels, first.explain().refused) == (1, 1)


def test_a_heavy_model_is_not_run_for_a_label_of_what_served_before(open_runtime, load, plan_of):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)
    pending = session.predict(scheduled())
    arm = load(0.1, policy=policy_of(spread=1.01))
    arm.runner.run_us = 1e6

    runtime.swap("toy", [arm], plan_of(arm))

    assert session.label(pending.id, 1) == type(session.label(pending.id, 1))(1, adapted=False)
    assert runtime.statistics()["sessions"]["open"] == 0


def test_sessions_of_a_heavy_model_are_moved_and_learn_on(open_runtime, load, plan_of):
    runtime = open_runtime(load(policy=policy_of()))
    session = runtime.session("toy", KEY)
    taught(session)
    arm = load(0.1, policy=policy_of(spread=1.01))
    arm.runner.run_us = 1e6

    runtime.swap("toy", [arm], plan_of(arm))
    until(lambda: runtime.statistics()["sessions"]["rebased"])

    answer = session.predict(scheduled())
    assert answer.adapted
    assert session.label(answer.id, 1).adapted
    assert session.explain().labels == 6


def test_what_waits_for_a_label_ends_where_nobody_asks(tmp_path, write_package):
    path, _ = write_package(policy=policy_of())
    config = msgspec.structs.replace(
        local_config(path, "toy", tmp_path / "state"), sessions=SessionsConfig(ttl_s=0.05)
    )
    with Runtime.open(config) as runtime:
        for _ in range(2):
            answer = runtime.session("toy", KEY).predict(scheduled())
            until(lambda: not runtime.statistics()["sessions"]["pending"])

            assert not runtime.session("toy", KEY).label(answer.id, 1).adapted


def test_an_old_answer_teaches_nothing(open_runtime, load, clock):
    runtime = open_runtime(load(policy=policy_of()), ttl_s=60.0)
    session = runtime.session("toy", KEY)
    old = session.predict(scheduled())
    runtime.report({})
    clock.advance(59)
    young = session.predict(scheduled())
    clock.advance(1)
    runtime.report({})

    assert not session.label(old.id, 1).adapted
    assert session.label(young.id, 1).adapted
    assert runtime.log.handed_out("label") == 2


def test_sessions_that_are_kept_are_moved_to_what_serves_after_the_restart(tmp_path, write_package):
    def config_of(bias):
        path, _ = write_package(bias=bias, policy=policy_of(spread=1 + bias))
        return msgspec.structs.replace(
            local_config(path, "toy", tmp_path / "state"), sessions=SessionsConfig(keep=True)
        )

    with Runtime.open(config_of(0.0)) as runtime:
        taught(runtime.session("toy", KEY))
        taught(runtime.session("toy", "grace"))

    with Runtime.open(config_of(0.1)) as again:
        assert again.session("toy", KEY).predict(scheduled()).adapted
        until(lambda: again.statistics()["sessions"]["rebased"] == 2)
        assert again.session("toy", "grace").explain().labels == 5


def test_sessions_that_cannot_be_kept_cost_the_log_nothing(tmp_path, write_package):
    path, _ = write_package(policy=policy_of())
    config = msgspec.structs.replace(
        local_config(path, "toy", tmp_path / "state"), sessions=SessionsConfig(keep=True)
    )
    runtime = Runtime.open(config)
    runtime.predict("toy", scheduled())
    broken = Ground(policy_of().prior, release=object())
    runtime.adapting.sessions.open(("toy", KEY), broken)

    with pytest.raises(TypeError):
        runtime.close()

    with Runtime.open(config) as again:
        assert again.journal.replayed == 0
        assert again.epoch > runtime.epoch
