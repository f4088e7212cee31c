"""Windows over labels: each is seen once, in event time, and a restart leaves no trace."""

from __future__ import annotations

import asyncio
import shutil

import msgspec
import numpy as np
import pytest

from edge_runtime import factory
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.errors import RequestError
from edge_runtime.features.spec import Spec
from edge_runtime.inference import history
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec
from edge_runtime.wire.messages import ObservationRecord

NOW_S = 1_360_000_000.0
FEATURES = """
version = 1
[[features]]
name = "labels"
window = { over = "label", statistic = "count", span_s = 7200.0 }
[[features]]
name = "rate"
fill = -1.0
window = { over = "label", key = "carrier", statistic = "mean", span_s = 7200.0 }
[[features]]
name = "asked"
window = { over = "scheduled", statistic = "count", span_s = 7200.0 }
"""


def scheduled(time_s=NOW_S, carrier="UA"):
    return Event("scheduled", time_s, {"carrier": carrier, "distance": 1.0})


def departed(time_s):
    return Event("departed", time_s, {"carrier": "UA", "delay": 1.0})


@pytest.fixture
def config(tmp_path, write_package):
    config = EdgeConfig(
        device="EWR", families=["toy"], state_dir=tmp_path / "state", socket=tmp_path / "edge.sock"
    )
    path, _ = write_package(spec=Spec.from_toml(FEATURES))
    factory.install(config, path, factory.inspect(path))
    return config


def opened(config):
    return Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1)


@pytest.fixture
def runtime(config):
    with opened(config) as runtime:
        yield runtime


def settle(runtime):
    async def wait():
        for name in ("event", "label"):
            await runtime.log.wait_durable(name, runtime.log.handed_out(name))

    asyncio.run(wait())


def pipeline(runtime):
    return runtime._members["toy"].pipeline


def known(runtime, time_s=NOW_S, carrier="UA"):
    """What the windows say: labels, the carrier's rate, questions."""
    [engine] = pipeline(runtime).engines.values()
    return engine.vector(time_s, {"carrier": carrier}).tolist()


def crashed(runtime, folder):
    """The configuration of a device that finds what a power cut at this moment would leave."""
    shutil.copytree(runtime.config.state_dir, folder)
    return msgspec.structs.replace(runtime.config, state_dir=folder)


def test_a_label_is_seen_with_the_fields_of_its_prediction(runtime):
    united, american = (runtime.predict("toy", scheduled(NOW_S, each)) for each in ("UA", "AA"))
    runtime.label(united.id, 1.0, time_s=NOW_S + 10)
    runtime.label(american.id, 0.0, time_s=NOW_S + 5)
    assert known(runtime, NOW_S + 10) == [2, 1, 2]
    assert known(runtime, NOW_S + 10, "AA") == [2, 0, 2]
    assert known(runtime, NOW_S + 7, "UA") == [1, -1, 2]


def test_the_log_says_in_one_order_what_the_windows_saw(runtime):
    answer = runtime.predict("toy", scheduled())
    runtime.observe("toy", departed(NOW_S + 1))
    runtime.label(answer.id, 1, time_s=NOW_S + 2)
    settle(runtime)
    records = [codec.decode_record(data) for _, _, data in runtime.log.tail("event", 0, 0)]
    fields = {"carrier": "UA", "label.value": 1.0, "label.epoch": 1, "label.seq": 1}
    assert records[2] == ObservationRecord("toy", "label", NOW_S + 2, fields)
    assert runtime.counters()["observations"] == 1


def test_only_the_first_final_label_is_seen(runtime):
    answer = runtime.predict("toy", scheduled())
    runtime.label(answer.id, 0.0, final=False)
    assert known(runtime)[0] == 0
    runtime.label(answer.id, 1.0)
    runtime.label(answer.id, 0.0)
    assert known(runtime)[:2] == [1, 1]
    assert (runtime.log.handed_out("label"), runtime.log.handed_out("event")) == (3, 2)


def test_a_label_that_joins_nothing_here_moves_nothing(runtime):
    runtime.observe("toy", departed(NOW_S))
    before = pipeline(runtime).snapshot()
    runtime.label("EWR.1.1", 1.0)
    with pytest.raises(RequestError, match="unknown_prediction"):
        runtime.label("EWR.1.2", 1.0)
    assert pipeline(runtime).snapshot() == before
    assert runtime.log.handed_out("event") == 1


def test_a_label_far_behind_or_ahead_of_the_events_is_logged_and_counted_and_not_seen(runtime):
    answer = runtime.predict("toy", scheduled())
    before = pipeline(runtime).snapshot()
    for seq, time_s in enumerate((NOW_S - 7201, NOW_S + 86_401), start=1):
        assert runtime.label(answer.id, 1.0, time_s=time_s) == seq
        assert runtime.counters()["late_labels"] == seq
    assert pipeline(runtime).snapshot() == before
    runtime.label(answer.id, 1.0, time_s=NOW_S + 60)
    assert known(runtime, NOW_S + 60)[0] == 1


def test_a_label_never_moves_the_event_clock(runtime):
    answer = runtime.predict("toy", scheduled())
    runtime.label(answer.id, 1.0, time_s=NOW_S + 80_000)
    assert pipeline(runtime).newest_s == NOW_S
    runtime.observe("toy", departed(NOW_S - 7000))
    assert runtime.counters()["late_events"] == 0


def test_nobody_can_observe_a_label(runtime):
    runtime.predict("toy", scheduled())
    fields = {"carrier": "UA", "label.value": 1.0, "label.epoch": 1, "label.seq": 1}
    with pytest.raises(RequestError, match="unknown_kind"):
        runtime.observe("toy", Event("label", NOW_S, fields))


def test_without_windows_over_labels_nothing_more_is_logged(config, write_package):
    path, _ = write_package()
    factory.install(config, path, factory.inspect(path))
    with opened(config) as runtime:
        answer = runtime.predict("toy", scheduled())
        runtime.label(answer.id, 1.0)
        assert runtime.log.handed_out("event") == 1
        assert pipeline(runtime).answered.record((1, 1), 1.0) is None


def test_what_waits_for_a_label_is_bounded_and_the_oldest_is_forgotten(runtime):
    answers = []
    for start in range(0, history.ANSWERED_MAX + 3, 500):
        count = min(500, history.ANSWERED_MAX + 3 - start)
        answers += runtime.predict_many("toy", [scheduled(NOW_S + start)] * count)
    assert runtime.statistics()["families"]["toy"]["labels_forgotten"] == 3
    last_s = pipeline(runtime).newest_s
    for answer in (*answers[:4], answers[-1]):
        runtime.label(answer.id, 1.0, time_s=last_s)
    assert known(runtime, last_s)[0] == 2


def test_where_the_log_is_full_of_events_a_label_is_kept_and_seen(config):
    small = msgspec.structs.replace(config, log=LogConfig(bytes_max_mb=1))
    carrier = "x" * 1000
    with opened(small) as runtime:
        answer = runtime.predict("toy", scheduled())
        for _ in range(2000):
            runtime.observe("toy", Event("departed", NOW_S, {"carrier": carrier, "delay": 1.0}))
        before = pipeline(runtime).snapshot()
        runtime.label(answer.id, 1.0)
        assert runtime.log.handed_out("label") == 1
        assert pipeline(runtime).snapshot() != before


def play(runtime, steps, seed, answers):
    """Ask, observe and label in a random order; labels come for answers of any epoch."""
    random = np.random.default_rng(seed)
    for step in range(steps):
        time_s = NOW_S + 1000 * seed + 20 * step - float(random.choice([0, 0, 500, 9000]))
        choice = random.integers(4)
        if choice == 0:
            runtime.observe("toy", departed(time_s))
        elif choice == 1 or not answers:
            event = scheduled(time_s, str(random.choice(["UA", "AA"])))
            answers.append(runtime.predict("toy", event).id)
        else:
            which, final = int(random.integers(len(answers))), bool(random.integers(4))
            value = float(random.integers(2))
            label_s = time_s + float(random.integers(600))
            runtime.label(answers[which], value, time_s=label_s, final=final)


@pytest.mark.parametrize("clean", [True, False])
def test_a_restart_leaves_no_trace_in_the_windows(config, tmp_path, clean):
    runtime, answers = opened(config), []
    for epoch in range(1, 6):
        play(runtime, 80, epoch, answers)
        settle(runtime)
        before = pipeline(runtime).snapshot()
        if clean:
            runtime.close()
            config = runtime.config
        else:
            config = crashed(runtime, tmp_path / f"after-{epoch}")
            runtime.close()
        runtime = opened(config)
        assert (runtime.epoch, pipeline(runtime).snapshot()) == (epoch + 1, before)
    runtime.close()
    (config.state_dir / "windows.snapshot").unlink()
    with opened(config) as again:
        assert again.statistics()["snapshots"]["replayed"] > 100
        assert pipeline(again).snapshot() == before
        assert known(again, pipeline(again).newest_s)[0] > 0


def test_after_a_restart_the_label_of_an_earlier_prediction_is_seen(config):
    with opened(config) as runtime:
        early = runtime.predict("toy", scheduled(NOW_S, "AA"))
    with opened(config) as runtime:
        runtime.label(early.id, 1.0, time_s=NOW_S + 60)
        assert known(runtime, NOW_S + 60, "AA") == [1, 1, 1]
    with opened(config) as runtime:
        assert known(runtime, NOW_S + 60, "AA") == [1, 1, 1]
        runtime.label(early.id, 0.0, time_s=NOW_S + 60)
        assert known(runtime, NOW_S + 60, "AA") == [1, 1, 1]


def test_labels_go_on_across_a_change_of_features(config, write_package, runtime):
    answer = runtime.predict("toy", scheduled())
    other = FEATURES.replace('"rate"', '"ratio"').replace("fill = -1.0", "fill = -2.0")
    path, sha256 = write_package(bias=1.0, spec=Spec.from_toml(other))
    arm = load_arm(path, sha256, "stable", "r1", 1.0)
    stable = PlanArm("r1", model_path("toy", "r1"), sha256, 1, 1.0)
    runtime.swap("toy", [arm], Plan(family="toy", seq=2, stable=stable))
    assert known(runtime) == [0, -2, 1]
    runtime.label(answer.id, 1.0)
    assert known(runtime) == [1, 1, 1]
