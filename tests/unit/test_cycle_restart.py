"""A cycle with everything switched on, and restarted at every batch: the same bytes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cloud_learner.cycle import Cycle
from cloud_learner.store.examples import Batch, Example
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
from cloud_learner.train.teaching import TrainingError

BATCHES, FLIPS_AT, FAILS_AT = 24, (18, 22), 5
STEEP = "self.out.weight.data.copy_(torch.tensor([[0.0, 2.0, 0.0]]))"
ALL_ON = """
trim_share = 0.1

[learning.scratch]
on = true
every_s = 500.0
window_rows = 300

[learning.fast]
learning_rate = 0.02
"""


@pytest.fixture
def family(coin, tmp_path):
    changes = {
        "family.toml": ("\n[learning.fast]\n", ALL_ON),
        "network.py": ("nn.init.constant_(self.out.weight, 0.3)", STEEP),
    }
    return Family.load(coin.write_family(tmp_path / "coin", changes))


def reference():
    return np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)


def batches(family):
    """Some rows come early, and once more with the next batch; one device always lies,
    and two times the world turns round; one batch holds what no network can bear.
    """
    random, seq, again = np.random.default_rng(2), 0, []
    for number in range(1, BATCHES + 1):
        turned = sum(number >= at for at in FLIPS_AT) % 2
        some, early = again, []
        for row in random.normal(size=(200, 3)).astype("<f4"):
            seq += 1
            device = "abcdefgg"[seq % 8]
            label = float((row[1] > 0) != (turned ^ (device == "g")))
            made = example(family, device, seq, row, label)
            if seq % 11 < 3:
                early.append(made)
                made = msgspec.structs.replace(made, early=True, weight=2.0)
            some = [*some, made]
        if number == FAILS_AT:
            wild = np.full(3, 3e38, "<f4").tobytes()
            some[:5] = [msgspec.structs.replace(each, features=wild) for each in some[:5]]
        again = early
        yield Batch(number, some)


def example(family, device, seq, row, label):
    times = (1000.0 + seq, 1005.0 + seq)
    spec, features = family.spec.hash, row.tobytes()
    return Example(device, 1, seq, "coin", *times, features, spec, label, 1.0, [], 1.0, 1.0)


def played(family, graph, path=None):
    """Each batch's alarms, the answers after it, and the last candidate; restarted with `path`."""
    cycle, story = Cycle(family, reference()), []
    cycle.pretrain(Rows(reference(), (reference()[:, 1] > 0).astype(np.float32)))
    for batch in batches(family):
        if path is not None:
            cycle.save(path)
            cycle = Cycle(family, reference())
            cycle.restore(path)
        try:
            cycle.learn(batch)
        except TrainingError as error:
            story.append(error.code)
        story.append((cycle.alarms, cycle.answers(reference()).tobytes()))
    cycle.take_graph(graph)
    return cycle, story, cycle.candidate()


def test_a_cycle_that_is_restarted_at_every_batch_gives_the_same_bytes(
    family, coin_graph, tmp_path
):
    straight, story, candidate = played(family, coin_graph)
    again, same, bytes_again = played(family, coin_graph, tmp_path / "checkpoint.pt")

    assert (same, bytes_again) == (story, candidate)
    assert again.sample_passes == straight.sample_passes
    teaching = straight.teaching  # and all of it was at work
    assert story.count("not_finite") == 1
    assert {a.source for each in story if each != "not_finite" for a in each[0]} >= {"loss"}
    assert set(teaching.replicas.all) == {"fast", "stable", "scratch"}
    assert teaching.trust.counters["quarantines"] > 0
    assert teaching.trimmed_rows > 0
    assert len(teaching.concepts) > 0
