"""The runtime: answers, records, labels, and what a restart brings back."""

from __future__ import annotations

import asyncio
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime import factory
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.errors import CapacityError, ConfigError, RequestError
from edge_runtime.events.journal import SNAPSHOT_EVERY
from edge_runtime.inference.slot import load_arm
from edge_runtime.metrics import Histogram
from edge_runtime.rollout.plan import Plan, choose
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord, PredictionRecord, Record

NOW_S = 1_360_000_000.0
WritePackage = Callable[..., tuple[Path, str]]
PlanOf = Callable[..., Plan]


def scheduled(time_s: float = NOW_S, carrier: str = "UA", distance: float = 998.0) -> Event:
    return Event("scheduled", time_s, {"carrier": carrier, "distance": distance})


def departed(time_s: float, delay: float, carrier: str = "UA") -> Event:
    return Event("departed", time_s, {"carrier": carrier, "delay": delay})


@pytest.fixture
def config(tmp_path: Path) -> EdgeConfig:
    return EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        attributes={"airport": "EWR"},
    )


@pytest.fixture
def installed(config: EdgeConfig, write_package: WritePackage) -> EdgeConfig:
    path, _ = write_package()
    factory.install(config, path, factory.inspect(path))
    return config


def open_runtime(config: EdgeConfig) -> Runtime:
    return Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1)


def settle(runtime: Runtime) -> None:
    """Wait until everything that was logged is durable."""

    async def wait() -> None:
        for event_class in ("event", "label"):
            await runtime.log.wait_durable(event_class, runtime.log.handed_out(event_class))

    asyncio.run(wait())


def logged(runtime: Runtime, event_class: str = "event") -> list[Record]:
    settle(runtime)
    return [codec.decode_record(data) for _, _, data in runtime.log.tail(event_class, 0, 0)]


def crashed(runtime: Runtime, folder: Path) -> EdgeConfig:
    """The configuration of a device that finds what a power cut at this moment would leave."""
    shutil.copytree(runtime.config.state_dir, folder)
    return msgspec.structs.replace(runtime.config, state_dir=folder)


def test_before_its_first_release_a_device_answers_with_a_named_error(config: EdgeConfig) -> None:
    with open_runtime(config) as runtime:
        with pytest.raises(RequestError, match="no_release"):
            runtime.predict("toy", scheduled())
        assert runtime.log.handed_out("event") == 0
        assert runtime.counters()["request_errors"] == 1


def test_a_factory_package_answers(installed: EdgeConfig) -> None:
    with open_runtime(installed) as runtime:
        answer = runtime.predict("toy", scheduled())
        logit = (2 + 998 + 0 - 1 + 0) / 1000  # carrier, distance, seen, empty mean, sum
        assert answer.id == "EWR.1.1"
        assert answer.outputs == [pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)]
        assert answer.release.startswith("factory-")
        assert answer.arm == "stable"


def test_what_was_observed_counts_in_the_next_answer(installed: EdgeConfig) -> None:
    with open_runtime(installed) as runtime:
        runtime.observe("toy", departed(NOW_S - 60, 30.0))
        runtime.observe("toy", departed(NOW_S - 30, 10.0, carrier="AA"))
        runtime.predict("toy", scheduled())
        record = logged(runtime)[-1]
        assert isinstance(record, PredictionRecord)
        assert np.frombuffer(record.features, "<f4").tolist() == [2.0, 998.0, 2.0, 20.0, 30.0]
        assert record.fields == {"carrier": "UA", "distance": 998.0}
        assert (record.propensity, len(record.scored)) == (1.0, 1)


def test_two_arms_both_score_and_one_answers_as_the_plan_says(
    config: EdgeConfig, write_package: WritePackage, plan_of: PlanOf
) -> None:
    stable = load_arm(write_package(0.0)[0], None, "stable", "r1", 0.75)
    canary = load_arm(write_package(1.0)[0], None, "canary", "r2", 0.25)
    with open_runtime(config) as runtime:
        runtime.swap("toy", [stable, canary], plan_of(stable, canary))
        answers = [runtime.predict("toy", scheduled()) for _ in range(200)]
        expected = [choose([0.75, 0.25], "s|EWR", 1, seq) for seq in range(1, 201)]
        assert [answer.arm for answer in answers] == [["stable", "canary"][i] for i in expected]
        assert 20 < sum(expected) < 80
        for answer, record in zip(answers, logged(runtime), strict=True):
            assert isinstance(record, PredictionRecord)
            first, second = record.scored
            assert (first.arm, first.outputs) == (answer.arm, answer.outputs)
            assert {first.release, second.release} == {"r1", "r2"}
            assert record.propensity == (0.75 if answer.arm == "stable" else 0.25)


def test_a_swap_drops_nothing_and_keeps_the_windows(
    installed: EdgeConfig, write_package: WritePackage, plan_of: PlanOf
) -> None:
    arm = load_arm(write_package(2.0)[0], None, "stable", "r2", 1.0)
    with open_runtime(installed) as runtime:
        runtime.observe("toy", departed(NOW_S, 30.0))
        runtime.predict("toy", scheduled())
        runtime.swap("toy", [arm], plan_of(arm))
        after = runtime.predict("toy", scheduled())
        first, second = logged(runtime)[1:]
        assert (after.release, after.id) == ("r2", "EWR.1.3")
        assert isinstance(first, PredictionRecord)
        assert isinstance(second, PredictionRecord)
        assert first.features == second.features
        counters = runtime.counters()
        assert (counters["swaps"], counters["swap_failures"]) == (2, 0)
        assert (counters["requests_dropped"], counters["predictions"]) == (0, 2)


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (Event("sheduled", NOW_S, {}), "unknown_kind"),
        (Event("departed", NOW_S, {"carrier": "UA", "delay": 1.0}), "not_predicted"),
        (Event("scheduled", NOW_S, {"carrier": "UA"}), "missing_field"),
        (Event("scheduled", NOW_S, {"carrier": 3, "distance": 1.0}), "wrong_type"),
        (Event("scheduled", NOW_S, {"carrier": "UA", "distance": True}), "wrong_type"),
        (Event("scheduled", NOW_S, {"carrier": "UA", "distance": math.nan}), "not_finite"),
        (Event("scheduled", math.inf, {"carrier": "UA", "distance": 1.0}), "not_finite"),
        (scheduled(NOW_S + 10 * 86400), "event_from_future"),
        (scheduled(distance=1 << 70), "out_of_range"),
    ],
)
def test_a_refused_event_is_named_and_leaves_no_trace(
    installed: EdgeConfig, event: Event, code: str
) -> None:
    with open_runtime(installed) as runtime:
        runtime.predict("toy", scheduled())
        with pytest.raises(RequestError) as caught:
            runtime.predict("toy", event)
        assert caught.value.code == code
        runtime.predict("toy", scheduled())
        before, after = logged(runtime)
        assert before == after
        assert runtime.counters()["request_errors"] == 1


def test_a_family_that_is_not_served_is_named(installed: EdgeConfig) -> None:
    with open_runtime(installed) as runtime, pytest.raises(RequestError) as caught:
        runtime.observe("flights", departed(NOW_S, 1.0))
    assert (caught.value.code, caught.value.hint) == ("unknown_family", "it serves: toy")


def test_a_label_is_logged_in_its_own_class(installed: EdgeConfig) -> None:
    with open_runtime(installed) as runtime:
        answer = runtime.predict("toy", scheduled())
        assert runtime.label(answer.id, 1, time_s=NOW_S + 60, final=False) == 1
        assert runtime.label(answer.id, 0.5) == 2
        assert logged(runtime, "label") == [
            LabelRecord("toy", 1, 1, 1.0, NOW_S + 60, final=False),
            LabelRecord("toy", 1, 1, 0.5, NOW_S, final=True),
        ]


@pytest.mark.parametrize(
    ("prediction_id", "value", "code"),
    [
        ("EWR.1.2", 1.0, "unknown_prediction"),
        ("EWR.1.0", 1.0, "unknown_prediction"),
        ("EWR.2.1", 1.0, "unknown_prediction"),
        ("JFK.1.1", 1.0, "unknown_prediction"),
        ("EWR.1", 1.0, "unknown_prediction"),
        ("EWR.1.1.1", 1.0, "unknown_prediction"),
        ("EWR.1.²", 1.0, "unknown_prediction"),
        ("EWR.1." + "9" * 5000, 1.0, "unknown_prediction"),
        ("", 1.0, "unknown_prediction"),
        ("EWR.1.1", math.nan, "not_finite"),
        ("EWR.1.1", True, "wrong_type"),
        ("EWR.1.1", "late", "wrong_type"),
    ],
)
def test_a_label_that_joins_nothing_is_refused(
    installed: EdgeConfig, prediction_id: str, value: float, code: str
) -> None:
    with open_runtime(installed) as runtime:
        runtime.predict("toy", scheduled())
        with pytest.raises(RequestError) as caught:
            runtime.label(prediction_id, value)
        assert caught.value.code == code
        assert runtime.log.handed_out("label") == 0


def test_with_several_families_a_label_must_say_which(config: EdgeConfig) -> None:
    both = msgspec.structs.replace(config, families=["toy", "other"])
    with open_runtime(both) as runtime, pytest.raises(RequestError, match="unknown_family"):
        runtime.label("EWR.1.1", 1.0)


def test_after_a_clean_restart_the_windows_are_there_without_reading_the_log(
    installed: EdgeConfig,
) -> None:
    with open_runtime(installed) as runtime:
        runtime.observe("toy", departed(NOW_S, 0.1))
        runtime.observe("toy", departed(NOW_S + 1, 0.2))
        last = runtime.predict("toy", scheduled())
        before = logged(runtime)[-1]
    with open_runtime(installed) as runtime:
        assert runtime.statistics()["snapshots"]["replayed"] == 0
        answer = runtime.predict("toy", scheduled())
        after = logged(runtime)[-1]
        assert isinstance(before, PredictionRecord)
        assert isinstance(after, PredictionRecord)
        assert after.features == before.features
        assert (last.id, answer.id) == ("EWR.1.3", "EWR.2.1")
        assert runtime.label(last.id, 1.0) == 1


def test_after_a_crash_the_windows_are_those_of_the_durable_log(
    installed: EdgeConfig, tmp_path: Path
) -> None:
    written = threading.Event()
    with open_runtime(installed) as runtime:
        journal = runtime.journal
        journal.on_commit = lambda: written.set() if journal.trim_floor() > (0, 0) else None
        for step in range(SNAPSHOT_EVERY + 500):
            runtime.observe("toy", departed(NOW_S + step, math.sin(step) * 100))
        assert written.wait(4)
        settle(runtime)
        with open_runtime(crashed(runtime, tmp_path / "after")) as revived:
            replayed = revived.statistics()["snapshots"]["replayed"]
            assert (revived.journal.trim_floor(), replayed) == ((1, SNAPSHOT_EVERY), 500)
            for each in (runtime, revived):
                each.predict("toy", scheduled(NOW_S + SNAPSHOT_EVERY + 500))
            assert logged(revived)[-1] == logged(runtime)[-1]


def test_a_damaged_snapshot_costs_time_and_nothing_else(
    installed: EdgeConfig, tmp_path: Path
) -> None:
    with open_runtime(installed) as runtime:
        for step in range(10):
            runtime.observe("toy", departed(NOW_S + step, step / 3))
        before = runtime.predict("toy", scheduled(NOW_S + 10))
        features = logged(runtime)[-1]
    damaged = installed.state_dir / "windows.snapshot"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with open_runtime(installed) as runtime:
        assert runtime.statistics()["snapshots"]["unreadable"] == 1
        assert runtime.statistics()["snapshots"]["replayed"] == 11
        after = runtime.predict("toy", scheduled(NOW_S + 10))
        assert logged(runtime)[-1] == features
        assert after.outputs == before.outputs


def test_what_a_crash_took_is_named_when_its_label_comes(
    installed: EdgeConfig, tmp_path: Path
) -> None:
    with open_runtime(installed) as runtime:
        kept = runtime.predict("toy", scheduled())
        settle(runtime)
        after = crashed(runtime, tmp_path / "after")
        lost = runtime.predict("toy", scheduled())
    with open_runtime(after) as revived:
        assert revived.label(kept.id, 1.0) == 1
        with pytest.raises(RequestError) as caught:
            revived.label(lost.id, 1.0)
        assert caught.value.code == "prediction_lost"
        assert revived.survived() == [(1, "event", 1), (1, "label", 0)]


def test_a_damaged_package_costs_the_answers_until_the_next_update(
    installed: EdgeConfig, write_package: WritePackage, plan_of: PlanOf
) -> None:
    with open_runtime(installed) as runtime:
        runtime.observe("toy", departed(NOW_S, 30.0))
    [package] = (installed.state_dir / "shelf" / "packages").glob("*.onnx")
    package.write_bytes(package.read_bytes() + b"!")
    arm = load_arm(write_package(2.0)[0], None, "stable", "r2", 1.0)
    with open_runtime(installed) as runtime:
        with pytest.raises(RequestError, match="no_release"):
            runtime.predict("toy", scheduled())
        runtime.swap("toy", [arm], plan_of(arm))
        assert runtime.predict("toy", scheduled()).release == "r2"
        record = logged(runtime)[-1]
        assert isinstance(record, PredictionRecord)
        assert np.frombuffer(record.features, "<f4").tolist()[2:] == [1.0, 30.0, 30.0]


def test_a_report_says_what_serves_and_what_was_counted(
    installed: EdgeConfig, write_package: WritePackage, plan_of: PlanOf
) -> None:
    with open_runtime(installed) as runtime:
        assert runtime.report({}).plan_seq == 0
        arm = load_arm(write_package(2.0)[0], None, "stable", "r2", 1.0)
        runtime.swap("toy", [arm], plan_of(arm, seq=7))
        for step in range(3):
            runtime.predict("toy", scheduled(NOW_S + step))
        runtime.observe("toy", departed(NOW_S - 3 * 7200, 1.0))
        settle(runtime)
        report = codec.decode_report(codec.encode(runtime.report({"expired": 2})))
        assert (report.device, report.epoch, report.plan_seq) == ("EWR", 1, 7)
        assert report.attributes == {"airport": "EWR"}
        assert [(a.family, a.arm, a.release) for a in report.arms] == [("toy", "stable", "r2")]
        assert report.counters == {
            "predictions": 3,
            "observations": 1,
            "labels": 0,
            "request_errors": 0,
            "swaps": 2,
            "swap_failures": 0,
            "late_events": 1,
            "late_labels": 0,
            "infers": 0,
            "requests_dropped": 0,
        }
        assert report.refused == {"expired": 2}
        assert Histogram(report.predict_us).total == 3
        assert report.log_bytes > 0
        assert report.log_pending == 0


def test_what_the_log_cannot_take_counts_as_dropped(installed: EdgeConfig) -> None:
    with open_runtime(installed) as runtime:
        answer = runtime.predict("toy", scheduled())
        runtime.log.close()
        with pytest.raises(CapacityError, match="log_closed"):
            runtime.label(answer.id, 1.0)
        assert runtime.counters()["requests_dropped"] == 1


def test_what_the_log_cannot_take_leaves_no_trace_in_the_windows(installed: EdgeConfig) -> None:
    with open_runtime(installed) as runtime:
        runtime.observe("toy", departed(NOW_S, 1.0))
        pipeline = runtime._members["toy"].pipeline
        before = pipeline.snapshot()
        runtime.log.close()
        with pytest.raises(CapacityError, match="log_closed"):
            runtime.observe("toy", departed(NOW_S + 60, 1.0))
        with pytest.raises(CapacityError, match="log_closed"):
            runtime.predict("toy", scheduled(NOW_S + 60))
        assert (pipeline.snapshot(), pipeline.newest_s) == (before, NOW_S)
        assert runtime.log.handed_out("event") == 1
        assert runtime.counters()["requests_dropped"] == 2


def test_a_log_that_is_full_refuses_no_event_and_stays_within_its_bound(
    installed: EdgeConfig,
) -> None:
    small = msgspec.structs.replace(installed, log=LogConfig(bytes_max_mb=1))
    carrier = "x" * 1000
    with open_runtime(small) as runtime:
        for number in range(1, 3001):
            runtime.observe("toy", departed(NOW_S, 1.0, carrier))
            if number % 100 == 0:
                asyncio.run(runtime.log.wait_durable("event", number))
        answer = runtime.predict("toy", scheduled(NOW_S + 60, carrier))
        runtime.label(answer.id, 1.0)
        assert runtime.counters()["requests_dropped"] == 0
        assert runtime._members["toy"].pipeline.statistics()["entries"] > 3000
        assert runtime.statistics()["log"]["bytes"] < 1.2 * (1 << 20)
        assert runtime.statistics()["log"]["event_dropped"] > 1000


def test_durable_returns_once_a_prediction_survives_a_power_cut(installed: EdgeConfig) -> None:
    slow = msgspec.structs.replace(installed, log=LogConfig(linger_ms=1000, linger_max_ms=1000))

    async def story() -> str:
        answer = runtime.predict("toy", scheduled())
        await runtime.durable(answer.id)
        assert runtime.log.durable("event")[1] == 1
        for unknown in (f"EWR.{runtime.epoch}.2", "JFK.1.1", "EWR.7.1"):
            with pytest.raises(RequestError, match="unknown_prediction"):
                await runtime.durable(unknown)
        return answer.id

    with open_runtime(slow) as runtime:
        first = asyncio.run(story())
    with open_runtime(slow) as runtime:
        asyncio.run(runtime.durable(first))
        with pytest.raises(RequestError, match="prediction_lost"):
            asyncio.run(runtime.durable("EWR.1.2"))


def test_a_state_directory_has_one_owner(installed: EdgeConfig) -> None:
    with open_runtime(installed), pytest.raises(ConfigError, match="already_owned"):
        open_runtime(installed)


def test_a_configuration_file_opens_a_runtime(installed: EdgeConfig, tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text('device="EWR"\nfamilies=["toy"]\nstate_dir="state"\nsocket="s"\n')
    with Runtime.open(path) as runtime:
        assert runtime.predict("toy", scheduled()).id == f"EWR.{runtime.epoch}.1"
