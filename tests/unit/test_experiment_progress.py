"""Progress in words, no more often than somebody wants to hear it."""

from __future__ import annotations

import numpy as np

from cloud_learner.cycle import Cycle
from cloud_learner.experiment.pretraining import pretrain
from cloud_learner.experiment.progress import TELL_S, Progress
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
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


def test_as_long_as_nothing_is_done_it_tells_nothing() -> None:
    told, clock = [], ManualClock(0.0)
    progress = Progress("learning", 100, told.append, clock)

    clock.advance(100.0)
    progress.step(0)
    assert told == []
    progress.step(50)
    assert told == ["learning: 50%, about 2 min left"]


class Hasty(ManualClock):
    """A clock that is a second further each time that somebody looks."""

    def monotonic_s(self) -> float:
        self.advance(1.0)
        return super().monotonic_s()


def test_who_waits_for_the_first_learning_hears_of_it(coin, tmp_path) -> None:
    features = np.random.default_rng(1).normal(size=(2000, 3)).astype(np.float32)
    told, rows = [], Rows(features, (features[:, 1] > 0).astype(np.float32))
    family = Family.load(coin.write_family(tmp_path))
    watched, alone = Cycle(family, features), Cycle(family, features)
    pretrain(watched, rows, told.append, Hasty())
    alone.pretrain(rows)

    shares = [int(line.partition("%")[0].removeprefix("learning: ")) for line in told]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 50 < shares[-1] <= 100
    assert watched.answers(rows.features).tobytes() == alone.answers(rows.features).tobytes()
