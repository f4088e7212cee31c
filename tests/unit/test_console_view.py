"""The live view: what it draws of a controller's status, how often, and its plain lines."""

from __future__ import annotations

import asyncio
import hashlib
import io

import pytest
from rich.console import Console

from cloud_learner.console.panel import render
from cloud_learner.console.state import DeviceRow, FaultRow, LearnerRow, ViewState
from cloud_learner.console.view import LiveView, changes, is_plain, summary
from cloud_learner.controller import Controller
from cloud_learner.rollout.state import Offer, Rules
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from edge_runtime.clock import ManualClock
from edge_runtime.wire.messages import ArmReport, Report, Scored


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def offer(counter):
    return Offer(
        release=f"r{counter}",
        path=f"m/flight_delay/r{counter}.onnx",
        sha256=hashlib.sha256(bytes([counter])).hexdigest(),
        counter=counter,
        file=f"registry/{counter}",
        learned_through_s=0.0,
        arrived_s=0.0,
    )


def example(seq, old, new):
    return Example(
        device="EWR",
        epoch=1,
        seq=seq,
        family="flight_delay",
        time_s=float(seq),
        label_time_s=0.0,
        features=b"",
        spec="",
        label=float(seq % 4 == 0),
        propensity=0.5,
        scored=[Scored("r1", "stable", [old]), Scored("r2", "canary", [new])],
        arrived_s=0.0,
        matured_s=0.0,
    )


def rollout(tmp_path, offers=3, pairs=5, new=0.1):
    """A real controller's status after `offers` and `pairs` on which the canary answered `new`."""

    async def publish(release, plan, approval):
        pass

    async def main():
        controller = Controller(
            Rules(family="flight_delay", selector={"airport": "EWR"}),
            tmp_path / "campaign.json",
            publish,
            Lineage(tmp_path / "lineage"),
            ManualClock(100.0),
        )
        for counter in range(1, offers + 1):
            await controller.offer(offer(counter))
        arms = [ArmReport("flight_delay", "canary", "r2", 0.0)]
        await controller.report(
            Report(1, "EWR", 1, 0.0, {"airport": "EWR"}, arms, 2, {}, {}, [], 0, 0)
        )
        await controller.examples([example(seq + 1, 0.1, new) for seq in range(pairs)])
        status = controller.status()
        await controller.close()
        return status

    return asyncio.run(main())


def state(**values):
    defaults = {
        "version": "0.1.0",
        "broker_url": "nats://127.0.0.1:4222",
        "elapsed_s": 72.0,
        "event_time_s": 1_360_000_000.0,
        "devices": [
            DeviceRow(name="EWR", arms={"stable": "r1", "canary": "r2"}, p50_us=88, p99_us=412),
            DeviceRow(name="JFK", arms={"stable": "r1"}, log_pending=1530),
            DeviceRow(name="LGA", arms={}),
        ],
        "learner": LearnerRow(events_per_s=5312, archived=120_331, cycle=61),
    }
    return ViewState(**{**defaults, **values})


def drawn(shown, height=24, width=80):
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(render(shown, height))
    return console.file.getvalue()


FAULTS = [FaultRow(f"fault {i}", "as it should be " * 9, ok) for i, ok in enumerate((True, False))]


def test_a_picture_shows_devices_learner_and_the_gates_of_a_real_campaign(tmp_path):
    text = drawn(state(rollout=rollout(tmp_path), faults=FAULTS))

    for fact in ("stable r1, canary r2", "412 µs", "1,530", "5,312 events/s", "cycle 61"):
        assert fact in text
    for fact in ("canary r2 on EWR", "not worse", "of 50", "5 of 8,000", "waiting r3"):
        assert fact in text
    assert "2013-02-04 17:46 UTC" in text


def test_the_largest_picture_of_the_demo_fits_80_by_24(tmp_path):
    status = rollout(tmp_path)
    status["decisions"] = [
        {"release": f"r{i}", "reason": "promoted", "plan_seq": i, "note": "n" * 200}
        for i in range(10)
    ]
    lines = drawn(state(rollout=status, faults=FAULTS * 3)).splitlines()

    assert len(lines) == 23
    assert max(map(len, lines)) <= 80


def test_many_devices_are_counted_and_not_listed():
    text = drawn(state(devices=[DeviceRow(name=f"device-{i}") for i in range(9)]))

    assert "device-5" in text
    assert "device-6" not in text
    assert "3 more" in text


def test_a_state_is_told_by_a_word_without_any_colour():
    devices = [DeviceRow(name="EWR", state="killed"), DeviceRow(name="JFK", state="recovered")]
    text = drawn(state(devices=devices, faults=FAULTS))

    for word in ("killed", "recovered", "ok  fault 0", "BAD fault 1"):
        assert word in text


def test_before_the_first_release_and_the_first_canary_the_picture_says_so():
    text = drawn(state(devices=[], event_time_s=None))

    assert "nothing released yet" in text
    assert "no canary yet" in text


def test_freshness_and_weights_are_shown_once_known():
    weights = {"fast": 0.25, "stable": 0.75}
    row = LearnerRow(weights=weights, freshness_p50_s=0.82, freshness_p99_s=2.31)

    text = drawn(state(learner=row))
    assert "0.82 s p50, 2.31 s p99; replicas fast 0.25, stable 0.75" in text


def test_a_decision_is_named_with_its_reason(tmp_path):
    status = rollout(tmp_path, offers=2, pairs=200, new=0.95)

    assert "harm" in drawn(state(rollout=status))
    assert [line for line in changes(state(), state(rollout=status)) if "harm: r2" in line]


@pytest.mark.parametrize(
    ("stream", "environment", "plain"),
    [
        (Terminal(), {}, False),
        (Terminal(), {"NO_COLOR": "1"}, True),
        (Terminal(), {"NO_COLOR": ""}, False),
        (Terminal(), {"TERM": "dumb"}, True),
        (io.StringIO(), {}, True),
    ],
)
def test_a_picture_needs_a_terminal_that_wants_colour(stream, environment, plain):
    assert is_plain(stream, environment) is plain


def test_a_terminal_is_redrawn_at_most_twice_a_second_and_ends_with_the_last_state():
    stream, clock = Terminal(), ManualClock()
    with LiveView(stream, clock=clock, environment={"TERM": "xterm"}) as view:
        for cycle in range(41):
            view.update(state(learner=LearnerRow(cycle=1000 + cycle)))
            clock.advance(0.0625)
        before_end = stream.getvalue()

    drawn_cycles = [cycle for cycle in range(41) if f"cycle 1,0{cycle:02}" in before_end]
    assert drawn_cycles == [0, 8, 16, 24, 32, 40]
    assert "\x1b[" in before_end


def test_what_came_too_soon_to_be_drawn_is_drawn_at_the_end():
    stream = Terminal()
    with LiveView(stream, clock=ManualClock(), environment={"TERM": "xterm"}) as view:
        view.update(state(learner=LearnerRow(cycle=1)))
        view.update(state(learner=LearnerRow(cycle=777)))
        assert "cycle 777" not in stream.getvalue()

    assert "cycle 777" in stream.getvalue()


def test_the_screen_is_given_back_when_the_run_fails():
    stream = Terminal()

    def fail():
        with LiveView(stream, clock=ManualClock(), environment={"TERM": "xterm"}) as view:
            view.update(state())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_plain_view_prints_changes_at_once_and_a_summary_every_five_seconds():
    stream, clock = io.StringIO(), ManualClock()
    with LiveView(stream, clock=clock) as view:
        for second in range(11):
            killed = [DeviceRow(name="EWR", state="killed" if second == 3 else "up")]
            view.update(state(devices=killed, elapsed_s=float(second)))
            clock.advance(1.0)

    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines if "event time" in line] == [
        "0:00",
        "0:05",
        "0:10",
    ]
    assert [line for line in lines if "device" in line] == [
        "0:03  device EWR killed",
        "0:04  device EWR up",
    ]
    assert "\x1b" not in stream.getvalue()


def test_each_change_is_one_line_and_is_told_once(tmp_path):
    before = state()
    after = state(rollout=rollout(tmp_path), faults=[FaultRow("SIGKILL", "killed")])
    solved = state(rollout=after.rollout, faults=[FaultRow("SIGKILL", "nothing lost", True)])

    assert list(changes(before, after)) == [
        "1:12  canary r2 against r1",
        "1:12  fault SIGKILL: killed",
    ]
    assert list(changes(after, solved)) == ["1:12  fault SIGKILL: nothing lost (ok)"]
    assert list(changes(solved, solved)) == []


def test_a_summary_says_what_every_device_runs():
    assert "EWR=r1/r2,412us JFK=r1,0us LGA=-,0us" in summary(state())
