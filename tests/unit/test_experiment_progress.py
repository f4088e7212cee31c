"""Progress in words, no more often than somebody wants to hear it."""

from __future__ import annotations

from cloud_learner.experiment.progress import TELL_S, Progress
from edge_runtime.clock import ManualClock


def test_it_tells_how_much_is_done_and_how_long_the_rest_takes() -> None:
    told, clock = [], ManualClock(0.0)
    progress = Progress("replay", 1000, told.append, clock)

    progress.step(10)
    clock.advance(10.0)
    progress.step(190)
    clock.advance(TELL_S / 2)
    progress.step(100)

    assert told == ["replay: 20%, about 40 s left"]


def test_of_nothing_it_tells_nothing() -> None:
    told, clock = [], ManualClock(0.0)
    progress = Progress("replay", 0, told.append, clock)

    clock.advance(100.0)
    progress.step()

    assert told == []
