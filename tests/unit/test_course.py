"""The course of a family: what a bad batch does to it, and that it does nothing else."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud_learner.config import FamilyHome
from cloud_learner.course import CANDIDATE_S, CHECKPOINT_CYCLES, Course
from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.offline import EvaluationSet, save_set
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.lineage import Lineage
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
from cloud_learner.train.trust import Quarantined, Standing

HUGE, ODD = 50.0, 60.0  # values of x that the network below cannot bear
FORWARD = "        return self.out(self.drop((features - self.mean) / self.std))\n"
BAD_FORWARD = f"""        out = self.out(self.drop((features - self.mean) / self.std))
        if self.training and features[:, 1].max() == {HUGE}:
            out = out * float("nan")
        if self.training and features[:, 1].max() == {ODD}:
            raise RuntimeError("a shape that nobody thought of")
        return out
"""
Open = Callable[[], Course]


@pytest.fixture
def family(coin: types.SimpleNamespace, tmp_path: Path) -> Family:
    changes = {"network.py": (FORWARD, BAD_FORWARD)}
    return Family.load(coin.write_family(tmp_path / "coin", changes))


@pytest.fixture
def home(family: Family, coin_graph: Path, tmp_path: Path) -> FamilyHome:
    """What a bootstrap leaves of the family."""
    home = FamilyHome(tmp_path / "home")
    home.root.mkdir()
    reference = np.random.default_rng(1).normal(size=(120, 3)).astype(np.float32)
    save_set(home.reference, EvaluationSet(reference, np.zeros(0, np.float32)))
    shutil.copy(coin_graph, home.graph)
    cycle = Cycle(family, reference)
    cycle.pretrain(Rows(reference, (reference[:, 1] > 0).astype(np.float32)))
    cycle.save(home.checkpoint)
    return home


@pytest.fixture
def opened(family: Family, home: FamilyHome, tmp_path: Path) -> Open:
    return lambda: Course(family, home, Lineage(tmp_path / "lineage").of("coin"))


def values(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(50, 3)).astype("<f4")


def batch(number: int, rows: np.ndarray, family: Family, label: float | None = None) -> Batch:
    """A batch of these rows, of two devices; heads where x is positive, or all the same."""
    examples = [
        Example(
            device="ab"[at % 2],
            epoch=1,
            seq=100 * number + at,
            family="coin",
            time_s=1000.0 * number + at,
            label_time_s=1000.0 * number + at + 5,
            features=row.tobytes(),
            spec=family.spec.hash,
            label=float(row[1] > 0) if label is None else label,
            propensity=1.0,
            scored=[],
            arrived_s=1.0,
            matured_s=2.0,
        )
        for at, row in enumerate(rows)
    ]
    return Batch(number, examples)


def bad(number: int, family: Family, value: float) -> Batch:
    rows = values(number)
    rows[:, 1] = value
    return batch(number, rows, family)


def dealt(course: Course, batches: Sequence[Batch]) -> None:
    course.take(batches, 1e6)
    for _ in batches:
        course.learn()
        course.done(0.0)
        course.keep()


def package(course: Course) -> bytes:
    candidate = course.candidate()
    assert candidate is not None
    return candidate.package


def failed(tmp_path: Path) -> list[tuple[str, int, str]]:
    entries = Lineage(tmp_path / "lineage").read("failed")
    return [(entry["family"], entry["batch"], entry["code"]) for entry in entries]


def test_a_batch_that_makes_weights_no_numbers_is_passed_over_with_its_reason(
    opened: Open, family: Family, tmp_path: Path
) -> None:
    course = opened()
    dealt(course, [batch(1, values(1), family)])
    before = course.cycle.answers(values(9))

    dealt(course, [bad(2, family, HUGE)])

    assert np.array_equal(course.cycle.answers(values(9)), before)
    assert course.failure.startswith("batch 2: ")
    assert (course.number, course.statistics()["micro_batches_failed"]) == (2, 1)
    [(name, number, _)] = failed(tmp_path)
    assert (name, number) == ("coin", 2)
    dealt(course, [batch(3, values(3), family)])
    assert course.failure == ""
    assert not np.array_equal(course.cycle.answers(values(9)), before)
    assert np.isfinite(course.cycle.answers(values(9))).all()


def test_a_network_that_raises_leaves_the_state_as_if_the_batch_had_never_been(
    opened: Open, family: Family, home: FamilyHome, tmp_path: Path
) -> None:
    good = [batch(number, values(number), family) for number in (1, 2, 4)]
    shutil.copy(home.checkpoint, tmp_path / "checkpoint.pt")
    never = opened()
    dealt(never, good)
    shutil.copy(tmp_path / "checkpoint.pt", home.checkpoint)

    course = opened()
    dealt(course, [*good[:2], bad(3, family, ODD), good[2]])

    assert failed(tmp_path) == [("coin", 3, "RuntimeError")]
    assert package(course) == package(never)


def test_what_was_passed_over_before_keeps_no_family_from_being_brought_back(
    opened: Open, family: Family
) -> None:
    course = opened()
    dealt(course, [batch(1, values(1), family), bad(2, family, HUGE)])
    before = course.cycle.answers(values(9))

    dealt(course, [bad(3, family, ODD)])

    assert not course.rests
    assert np.array_equal(course.cycle.answers(values(9)), before)
    dealt(course, [batch(4, values(4), family)])
    assert course.failure == ""


def test_a_restart_passes_over_what_failed_without_another_word(
    opened: Open, family: Family, tmp_path: Path
) -> None:
    batches = [
        batch(1, values(1), family),
        bad(2, family, ODD),
        bad(3, family, HUGE),
        batch(4, values(4), family),
    ]
    first = opened()
    dealt(first, batches)
    once = failed(tmp_path)

    again = opened()  # from the checkpoint that the recovery wrote: after batch 1
    assert again.number == 1
    dealt(again, batches[1:])

    assert failed(tmp_path) == once
    assert [number for _, number, _ in once] == [2, 3]
    assert package(again) == package(first)
    assert again.failure == ""


def test_a_family_that_cannot_be_brought_back_rests_and_claims_no_time(
    opened: Open, family: Family, home: FamilyHome
) -> None:
    course = opened()
    dealt(course, [batch(1, values(1), family)])
    clock_s = course.clock_s
    home.checkpoint.unlink()

    course.take([bad(2, family, ODD), batch(3, values(3), family)], 1e9)
    course.learn()
    course.done(0.0)
    course.take([batch(4, values(4), family)], 1e9)

    assert course.rests
    assert "until the next start" in course.failure
    assert (len(course.waiting), course.clock_s) == (0, clock_s)
    course.save()
    assert not home.checkpoint.exists()


def test_a_full_disk_keeps_no_family_from_learning(
    opened: Open, family: Family, home: FamilyHome
) -> None:
    course = opened()
    kept = home.checkpoint.rename(home.root / "kept")
    home.checkpoint.mkdir()  # nothing can take this name now
    batches = [batch(at, values(at), family) for at in range(1, CHECKPOINT_CYCLES + 2)]

    dealt(course, batches[:-1])

    assert (course.cycle.number, course.saved) == (CHECKPOINT_CYCLES, 0)
    assert "was not written" in course.failure
    home.checkpoint.rmdir()
    kept.rename(home.checkpoint)
    dealt(course, batches[-1:])
    assert course.saved == CHECKPOINT_CYCLES + 1


@pytest.mark.parametrize("what", ["one class", "constant", "vanished"])
def test_poor_batches_are_learned_like_others(opened: Open, family: Family, what: str) -> None:
    course = opened()
    for number in range(1, 6):
        rows, label = values(number), None
        if what == "one class":
            label = 1.0
        elif what == "constant":
            rows[:] = 0.25
        else:
            rows[:, 1] = 0.0
            label = float(number % 2)
        dealt(course, [batch(number, rows, family, label)])

    assert (course.failure, course.statistics()["micro_batches_failed"]) == ("", 0)
    answers = course.cycle.answers(values(9))
    assert np.isfinite(answers).all()
    assert len(package(course)) > 0


def test_an_alarm_of_the_stream_is_told_once_also_when_its_batches_are_learned_again(
    opened: Open, family: Family, tmp_path: Path
) -> None:
    batches = [batch(number, values(number), family) for number in range(1, 9)]
    batches += [batch(number, values(number) + 3, family) for number in range(9, 15)]
    lineage = Lineage(tmp_path / "lineage")

    def told() -> list[tuple[str, str, int]]:
        entries = lineage.of("coin").read("alarm")
        return [(e["source"], e["name"], e["batch"]) for e in entries if e["source"] != "sketch"]

    dealt(opened(), batches[:11])
    first = told()
    lineage.of("coin").append("alarm", source="sketch", name="x", batch=14)  # told beside them
    dealt(opened(), batches)

    assert first
    assert told()[: len(first)] == first
    assert len(told()) == len(set(told()))
    assert all(batch > 8 for _, _, batch in told())


def test_what_a_batch_shows_is_told_also_when_it_cannot_be_learned(
    opened: Open, family: Family, tmp_path: Path
) -> None:
    rows = values(9) + 3
    rows[0, 1] = HUGE
    course = opened()

    dealt(course, [batch(number, values(number), family) for number in range(1, 9)])
    dealt(course, [batch(9, rows, family)])

    assert course.statistics()["micro_batches_failed"] == 1
    assert {entry["batch"] for entry in Lineage(tmp_path / "lineage").read("alarm")} == {9}


def test_a_quarantine_is_told_once_also_when_its_batch_is_learned_again(
    opened: Open, family: Family, tmp_path: Path
) -> None:
    lineage = Lineage(tmp_path / "lineage").of("coin")
    lineage.append("quarantine", batch=2, device="a", reason="harm")
    course = opened()  # from a checkpoint of before
    harm = Quarantined("a", 25, 0.1, Standing(9.0, 5.0))

    course.take([batch(2, values(2), family)], 1e6)
    course.cycle.teaching.trust.quarantined["a"] = harm
    course.learn()

    assert len(list(lineage.read("quarantine"))) == 1


def test_a_batch_that_holds_nothing_to_learn_makes_no_candidate(
    opened: Open, family: Family
) -> None:
    course = opened()
    other = [msgspec.structs.replace(e, spec="other") for e in batch(1, values(1), family).examples]
    course.take([Batch(1, other), batch(2, values(2), family)], 5000.0)

    course.learn()
    course.done(0.0)
    assert not course.is_fresh

    course.learn()
    course.done(0.0)
    assert course.is_fresh
    assert course.certificate is not None
    assert (course.certificate.batch, course.certificate.largest_share) == (2, 0.5)


def test_a_candidate_is_due_when_nothing_waits_or_what_was_learned_has_waited_too_long(
    opened: Open, family: Family
) -> None:
    course = opened()
    course.take([batch(number, values(number), family) for number in range(1, 6)], 1e9)

    def due(now_s: float) -> bool:
        course.learn()
        return course.done(now_s)

    assert not due(10.0)
    assert not due(10.0 + CANDIDATE_S / 2)
    assert due(10.0 + CANDIDATE_S)
    assert course.candidate() is not None
    assert not due(10.1 + CANDIDATE_S)
    assert due(10.2 + CANDIDATE_S)
    assert course.skipped == 3
