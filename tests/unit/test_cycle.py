"""One learning cycle: repeatable to the byte, honest about what it learned."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.alarms import Alarm
from cloud_learner.evaluate.offline import is_held_out
from cloud_learner.store.examples import Batch, Example
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
from cloud_learner.train.teaching import TrainingError
from edge_runtime.errors import ConfigError


@dataclasses.dataclass
class Bench:
    """A family, its kept graph, and cycles of it."""

    family: Family
    graph: object
    reference: np.ndarray

    def cycle(self, family=None) -> Cycle:
        cycle = Cycle(family or self.family, self.reference)
        cycle.take_graph(self.graph)
        return cycle

    def pretrained(self) -> Cycle:
        cycle = self.cycle()
        cycle.pretrain(Rows(self.reference, (self.reference[:, 1] > 0).astype(np.float32)))
        return cycle

    def batches(self, count, size=50, **changed):
        made, random = [], np.random.default_rng(5)
        for number in range(1, count + 1):
            values = random.normal(size=(size, self.family.spec.size)).astype("<f4")
            start = (number - 1) * size
            made.append(
                Batch(
                    number,
                    [self.example(start + at, row, **changed) for at, row in enumerate(values)],
                )
            )
        return made

    def example(self, seq, row, **changed):
        base = Example(
            device="ab"[seq % 2],
            epoch=1,
            seq=seq,
            family="coin",
            time_s=1000.0 + seq,
            label_time_s=1005.0 + seq,
            features=row.tobytes(),
            spec=self.family.spec.hash,
            label=float(row[1] > 0),
            propensity=1.0,
            scored=[],
            arrived_s=5000.0 + seq,
            matured_s=6000.0 + seq,
        )
        return msgspec.structs.replace(base, **changed)


@pytest.fixture(scope="module")
def bench(coin, coin_graph, tmp_path_factory):
    family = Family.load(coin.write_family(tmp_path_factory.mktemp("coin")))
    reference = np.random.default_rng(1).normal(size=(120, 3)).astype(np.float32)
    return Bench(family, coin_graph, reference)


def learn(cycle, batches):
    for batch in batches:
        cycle.learn(batch)
    return cycle


def test_the_same_batches_give_the_same_package_bytes(bench):
    first, again = (learn(bench.pretrained(), bench.batches(3)).candidate() for _ in range(2))

    assert first == again
    assert first.package != first.float_package
    assert first.package != bench.pretrained().candidate().package


def test_another_seed_gives_another_package(bench, coin, tmp_path):
    changed = coin.write_family(tmp_path, {"family.toml": ("seed = 7", "seed = 8")})
    other = learn(bench.cycle(Family.load(changed)), bench.batches(2)).candidate()

    assert learn(bench.cycle(), bench.batches(2)).candidate().package != other.package


def test_making_candidates_changes_nothing_that_is_learned_later(bench):
    asked, never = bench.pretrained(), bench.pretrained()
    for batch in bench.batches(3):
        asked.learn(batch)
        asked.candidate()
        never.learn(batch)

    assert asked.candidate() == never.candidate()


def test_a_restored_cycle_goes_on_as_the_first_would_have(bench, tmp_path):
    straight = learn(bench.pretrained(), bench.batches(4))
    halfway = learn(bench.pretrained(), bench.batches(2))
    halfway.save(tmp_path / "c.pt")

    other = bench.cycle()
    other.restore(tmp_path / "c.pt")
    assert (other.number, other.examples_learned) == (2, halfway.examples_learned)
    assert other.candidate() == halfway.candidate()
    learn(other, bench.batches(4)[2:])

    assert straight.candidate() == other.candidate()


def test_a_fork_stands_where_its_original_does_and_disturbs_nothing(bench):
    original = learn(bench.pretrained(), bench.batches(2))
    fork = original.fork()
    assert fork.candidate() == original.candidate()

    fork.pretrain(Rows(bench.reference, np.ones(len(bench.reference), np.float32)))
    assert fork.candidate().package != original.candidate().package

    learn(original, bench.batches(4)[2:])
    straight = learn(bench.pretrained(), bench.batches(4))
    assert straight.candidate() == original.candidate()


def test_held_out_examples_never_reach_training(bench):
    batches = bench.batches(3)
    held = [e for b in batches for e in b.examples if is_held_out(e)]
    lies = [
        Batch(
            b.number,
            [
                msgspec.structs.replace(e, label=1 - e.label) if is_held_out(e) else e
                for e in b.examples
            ],
        )
        for b in batches
    ]
    assert len(held) > 5

    truth, lied = learn(bench.pretrained(), batches), learn(bench.pretrained(), lies)

    for name, replica in truth.replicas.all.items():  # the weights between them may differ
        other = lied.replicas.all[name]
        assert np.array_equal(replica.answers(bench.reference), other.answers(bench.reference))
    assert truth.examples_learned == 150 - len(held)


def test_the_ledger_refuses_what_was_learned_already_and_counts_it(bench):
    (batch,) = bench.batches(1)
    once, twice = learn(bench.pretrained(), [batch]), learn(bench.pretrained(), [batch])
    fresh = once.examples_learned

    twice.learn(Batch(2, batch.examples))

    assert (once.ledger.learned_twice, twice.ledger.learned_twice) == (0, fresh)
    assert twice.examples_learned == fresh
    assert np.array_equal(
        once.replicas.answers(bench.reference), twice.replicas.answers(bench.reference)
    )


def test_a_double_inside_a_batch_is_learned_once(bench):
    (batch,) = bench.batches(1)
    doubled = Batch(1, batch.examples + batch.examples)

    cycle, single = learn(bench.pretrained(), [doubled]), learn(bench.pretrained(), [batch])

    assert cycle.ledger.learned_twice == single.examples_learned
    assert cycle.candidate() == single.candidate()


def test_an_example_of_another_feature_spec_is_counted_and_left_out(bench):
    (batch,) = bench.batches(1)
    stranger = bench.example(99, np.ones(7, np.float32), spec="other")

    cycle = learn(bench.pretrained(), [Batch(1, [*batch.examples, stranger])])

    assert cycle.ledger.other_spec == 1
    assert cycle.examples_learned == learn(bench.pretrained(), [batch]).examples_learned


def test_a_batch_with_nothing_to_learn_still_counts_as_learned(bench):
    cycle = learn(bench.pretrained(), [Batch(1, bench.batches(1, spec="other")[0].examples)])

    assert (cycle.number, cycle.examples_learned, cycle.whole) == (1, 0, True)


def test_a_batch_with_nothing_to_learn_raises_no_alarm_a_second_time(bench):
    cycle = bench.pretrained()
    cycle.alarms = [Alarm("sudden", "loss", "", 1.0, 0.5, 1, 0.0)]

    cycle.learn(Batch(2, bench.batches(1, spec="other")[0].examples))

    assert cycle.alarms == []


def test_a_cycle_of_some_features_learns_from_examples_that_carry_all(bench):
    family = bench.family.restricted(["x"])
    cycle = Cycle(family, bench.reference[:, [1]], bench.family.spec)
    learn(cycle, bench.batches(1))

    (batch,) = bench.batches(1)
    shown = [np.frombuffer(e.features, "<f4")[1] for e in batch.examples if not is_held_out(e)]
    assert cycle.replicas.reservoir.state()["features"][:, 0].tolist() == shown


def test_a_candidate_says_how_far_it_has_learned(bench):
    cycle = learn(bench.pretrained(), bench.batches(2))

    candidate = cycle.candidate()

    assert (candidate.number, candidate.learned_through_s) == (2, 1099.0)
    assert candidate.arrived_s == 6099.0
    assert sum(candidate.weights.values()) == pytest.approx(1.0)


def test_a_batch_that_would_leave_no_numbers_is_passed_over_and_nothing_else_changes(bench):
    batches = bench.batches(3)
    wild = [
        msgspec.structs.replace(e, features=np.full(3, 3e38, "<f4").tobytes())
        for e in batches[1].examples
    ]
    cycle, spared = learn(bench.pretrained(), batches[:1]), learn(bench.pretrained(), batches[:1])

    with pytest.raises(TrainingError) as caught:
        cycle.learn(Batch(2, wild))

    assert caught.value.code == "not_finite"
    assert "bounds" in caught.value.hint
    assert (cycle.number, cycle.failed, cycle.whole) == (2, 1, True)
    assert np.array_equal(cycle.answers(bench.reference), spared.answers(bench.reference))
    assert cycle.examples_learned == spared.examples_learned
    cycle.learn(Batch(3, batches[2].examples))
    assert np.isfinite(cycle.answers(bench.reference)).all()


def test_a_batch_of_one_class_is_learned(bench):
    ones = [msgspec.structs.replace(e, label=1.0) for e in bench.batches(1)[0].examples]
    before = bench.pretrained()

    after = learn(bench.pretrained(), [Batch(1, ones)])

    assert after.answers(bench.reference).mean() > before.answers(bench.reference).mean()


def test_an_early_example_is_learned_by_fast_alone_and_its_mature_form_by_the_memory(bench):
    (batch,) = bench.batches(1)
    early = [msgspec.structs.replace(e, early=True, weight=2.0) for e in batch.examples]
    cycle = bench.pretrained()
    start = {name: each.answers(bench.reference) for name, each in cycle.replicas.all.items()}
    seen = cycle.replicas.reservoir.seen

    def moved():
        return {
            name: not np.array_equal(each.answers(bench.reference), start[name])
            for name, each in cycle.replicas.all.items()
        }

    cycle.learn(Batch(1, early))
    assert moved() == {"fast": True, "stable": False}
    assert cycle.replicas.reservoir.seen == seen

    start["fast"] = cycle.replicas.fast.answers(bench.reference)
    cycle.learn(Batch(2, batch.examples))
    assert moved() == {"fast": False, "stable": True}
    assert cycle.replicas.reservoir.seen == seen + cycle.examples_learned
    assert cycle.ledger.learned_twice == 0


def test_what_learning_costs_is_counted_row_by_row(bench):
    cycle = bench.cycle()
    batch = Batch(1, [e for e in bench.batches(1)[0].examples if not is_held_out(e)])
    rows = len(batch.examples)

    cycle.learn(batch)

    fast, stable, student = 2 * rows, rows, rows  # passes; the reservoir is still empty
    assert cycle.sample_passes == fast + stable + student
    assert cycle.cpu_s > 0


def test_a_cycle_that_failed_in_the_middle_is_not_whole(bench):
    cycle = bench.pretrained()
    torn = [bench.example(seq, np.ones(2, np.float32)) for seq in range(100, 110)]

    with pytest.raises(ValueError, match="reshape"):
        learn(cycle, [Batch(1, [*bench.batches(1)[0].examples, *torn])])

    assert not cycle.whole


@pytest.mark.parametrize(
    "change",
    [
        {
            "network.py": (
                "self.out = nn.Linear(spec.size, 1)",
                "self.uot = self.out = nn.Linear(3, 1)",
            )
        },
        {"features.toml": ("[[features]]", '[[features]]\nname="x2"\nfield="x"\n[[features]]')},
        {"family.toml": ("reservoir_rows = 400", "reservoir_rows = 40")},
        {"family.toml": ("reservoir_rows = 400", "reservoir_rows = 4000")},
    ],
)
def test_a_checkpoint_of_another_family_folder_is_refused(bench, coin, tmp_path, change):
    learn(bench.pretrained(), bench.batches(10)).save(tmp_path / "c.pt")
    family = Family.load(coin.write_family(tmp_path / "f", change))
    width = family.spec.size
    cycle = Cycle(family, np.random.default_rng(0).normal(size=(9, width)).astype(np.float32))

    with pytest.raises(ConfigError, match=r"c\.pt") as caught:
        cycle.restore(tmp_path / "c.pt")
    assert caught.value.code == "bad_checkpoint"
