"""Detectors of drift: they find what changed, soon, and are silent where nothing did."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

from cloud_learner.stats import drift
from cloud_learner.stats.columns import LOOKS, ColumnShifts
from cloud_learner.stats.drift import MeanShift
from cloud_learner.stats.shifts import EmbeddingShift, ScoreShift
from edge_runtime.features.feature import Column
from edge_runtime.features.histogram import Histograms

ALPHA = 0.0004  # a fifth of the default delta
ROWS = 200
QUIET_STREAMS = [pytest.param(10, id="few"), pytest.param(200, id="many", marks=pytest.mark.slow)]
BATCHES = 100


def saved(state):
    """The state as a checkpoint brings it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def losses_of(levels, seed):
    """Micro-batches of losses in [0, 1] with these means."""
    random = np.random.default_rng(seed)
    return [random.beta(4 * level, 4 * (1 - level), ROWS) for level in levels]


def first_batch(add, batches):
    """The first micro-batch that `add` says something of; None where it is silent."""
    return next((at for at, each in enumerate(batches) if add(each) is not None), None)


def same(rows):
    return rows


def vectors(seed, count, shift=0.0):
    random = np.random.default_rng(seed)
    return [random.normal(shift, 1, (ROWS, 8)) for _ in range(count)]


# The loss.


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_jumps_is_found_within_two_micro_batches(seed):
    found = first_batch(MeanShift(ALPHA).add, losses_of([0.2] * 30 + [0.35] * 10, seed))

    assert found in (30, 31), f"seed {seed}"


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_climbs_is_found_before_it_is_at_its_top(seed):
    climb = [0.2 + 0.01 * step for step in range(30)]
    found = first_batch(MeanShift(ALPHA).add, losses_of([0.2] * 30 + climb, seed))

    assert found is not None, f"seed {seed}"
    assert 30 < found < 50, f"seed {seed}"


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_comes_and_goes_is_found_each_time_it_comes(seed):
    detector, levels = MeanShift(ALPHA), ([0.2] * 20 + [0.4] * 20) * 3
    found = [at for at, each in enumerate(losses_of(levels, seed)) if detector.add(each)]

    assert [at for at in (20, 60, 100) if {at, at + 1} & set(found)] == [20, 60, 100], found
    assert all(at % 40 in (20, 21, 22) for at in found), f"seed {seed}: {found}"


def test_a_rise_tells_both_means_and_a_fall_is_no_alarm():
    [rise] = filter(None, map(MeanShift(ALPHA).add, losses_of([0.2] * 30 + [0.5] * 2, 1)))

    assert rise.before == pytest.approx(0.2, abs=0.02)
    assert rise.before + 0.02 < rise.after < 0.5
    assert first_batch(MeanShift(ALPHA).add, losses_of([0.5] * 30 + [0.2] * 30, 1)) is None


@pytest.mark.parametrize("streams", QUIET_STREAMS)
def test_a_loss_that_stands_still_raises_fewer_alarms_than_its_share(streams):
    alarms = sum(
        MeanShift(ALPHA).add(each) is not None
        for seed in range(streams)
        for each in [np.concatenate(losses_of([0.25] * BATCHES, seed))]
    )
    print(f"{alarms} alarms in {streams * BATCHES} micro-batches that stand still")

    assert alarms <= 1 + 2 * ALPHA * streams * BATCHES


# Scores and embeddings.


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_another_distribution_are_found_with_the_first_micro_batch(seed):
    random = np.random.default_rng(50 + seed)
    batches = [random.beta(2, 5, ROWS) for _ in range(30)] + [random.beta(3, 4, ROWS)]

    assert first_batch(ScoreShift(ALPHA, seed).add, batches) == 30, f"seed {seed}"


@pytest.mark.parametrize("streams", QUIET_STREAMS)
def test_scores_that_stand_still_raise_no_more_alarms_than_their_share(streams):
    alarms = 0
    for seed in range(streams):
        random, test = np.random.default_rng(seed), ScoreShift(ALPHA, seed)
        alarms += sum(test.add(random.beta(2, 5, ROWS)) is not None for _ in range(BATCHES))
    print(f"{alarms} alarms in {streams * BATCHES} micro-batches that stand still")

    assert alarms <= 1 + 2 * ALPHA * streams * BATCHES


def test_scores_of_hours_that_always_differ_alarm_only_when_they_differ_more():
    random = np.random.default_rng(3)
    hours = [random.normal(random.normal(0, 0.5), 1, ROWS) for _ in range(100)]
    before = [np.concatenate(hours[at - 5 : at]) for at in range(5, 100)]
    tests = [drift.ks_test(b, hour, 1) for b, hour in zip(before, hours[5:], strict=True)]
    test = ScoreShift(ALPHA, 1)
    alarms = sum(test.add(each) is not None for each in hours)
    bare = sum(found.p <= ALPHA and found.size > 0.1 for found in tests)
    print(f"{alarms} alarms where the test alone raises {bare} in 95")

    assert alarms <= 5
    assert bare >= 25
    assert test.add(random.normal(4, 1, ROWS)) is not None


@pytest.mark.parametrize("seed", range(3))
def test_embeddings_that_move_are_found_with_the_first_micro_batch(seed):
    shift = EmbeddingShift(ALPHA, seed)
    found = [shift.add(each, same)[1] for each in vectors(seed, 12) + vectors(seed + 99, 1, 0.7)]

    assert [each is not None for each in found] == [False] * 12 + [True], f"seed {seed}"


def test_embeddings_that_turn_without_a_new_mean_are_found_too():
    random, shift = np.random.default_rng(1), EmbeddingShift(ALPHA, 1)
    for _ in range(10):
        assert shift.add(random.normal(0, 1, (ROWS, 4)), same)[1] is None

    turned = random.normal(0, 1, (ROWS, 4)) * [3.0, 0.3, 3.0, 0.3]
    assert shift.add(turned, same)[1] is not None


@pytest.mark.parametrize("streams", [pytest.param(2, id="few"), QUIET_STREAMS[1]])
def test_embeddings_that_stand_still_raise_no_more_alarms_than_their_share(streams):
    alarms = 0
    for seed in range(streams):
        shift = EmbeddingShift(ALPHA, seed)
        alarms += sum(shift.add(each, same)[1] is not None for each in vectors(seed, BATCHES))
    print(f"{alarms} alarms in {streams * BATCHES} micro-batches that stand still")

    assert alarms <= 1 + 2 * ALPHA * streams * BATCHES


def test_the_permutation_test_is_right_as_often_as_it_says():
    random = np.random.default_rng(5)
    found = [
        drift.mmd_test(random.normal(size=(30, 3)), random.normal(size=(40, 3)), 0.01, seed).p
        for seed in range(300)
    ]

    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(np.array(found) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_the_discrepancy_equals_the_sums_of_its_definition():
    random = np.random.default_rng(7)
    x, y = random.normal(size=(9, 2)), random.normal(1, 1, size=(7, 2))
    every = np.concatenate([x, y])
    apart = ((every[:, None] - every) ** 2).sum(2)
    kernel = np.exp(-apart / (2 * np.median(apart[np.triu_indices(16, 1)])))
    within = [
        (k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (kernel[:9, :9], kernel[9:, 9:])
    ]

    expected = sum(within) - 2 * kernel[:9, 9:].mean()
    assert drift.mmd_test(x, y, 0.05, 1).size == pytest.approx(expected)


def test_a_network_that_learned_is_no_shift_of_the_world():
    shift = EmbeddingShift(ALPHA, 1)
    found = [
        shift.add(rows, lambda x, grown=grown: x * 1.5**grown + grown)[1]
        for grown, rows in enumerate(vectors(1, 15))
    ]

    assert found == [None] * 15


def test_a_network_without_embeddings_is_not_watched_by_them():
    shift = EmbeddingShift(ALPHA, 1)

    assert [shift.add(each, lambda _rows: None) for each in vectors(1, 3)] == [(0.0, None)] * 3


# Features.


def test_psi_is_nothing_for_shares_that_are_alike_and_what_the_formula_says_otherwise():
    counts = np.array([100.0, 300.0, 600.0])

    assert drift.psi(counts, 10 * counts) == pytest.approx(0, abs=1e-3)
    p, q = np.array([0.1, 0.3, 0.6]), np.array([0.3, 0.3, 0.4])
    expected = float(((q - p) * np.log(q / p)).sum())
    assert drift.psi(1e6 * p, 1e6 * q) == pytest.approx(expected, rel=1e-4)


def test_psi_passes_its_bound_by_chance_as_often_as_it_says():
    random, share = np.random.default_rng(1), np.full(10, 0.1)
    bound = drift.psi_by_chance(2000, 500, 10, 0.05)
    beyond = [
        drift.psi(random.multinomial(2000, share), random.multinomial(500, share)) > bound
        for _ in range(2000)
    ]

    assert np.mean(beyond) == pytest.approx(0.05, abs=0.02)


COLUMNS = [Column("x", 0), Column("carrier", 6), Column("flat", 0)]


def table(random, rows, mean=0.0, words=(0.5, 0.3, 0.2), flat=4.0):
    carriers = random.choice(len(words), rows, p=words) + 1
    return np.stack([random.normal(mean, 1, rows), carriers, np.full(rows, flat)], 1).astype("f4")


def judged(shifts, rows):
    found = Histograms(COLUMNS)
    found.add(rows)
    return [each.name for each in shifts.judge(found.counts, found.counts)]


def column_shifts(random):
    known = Histograms(COLUMNS)
    known.add(table(random, 2000))
    return ColumnShifts(COLUMNS, known, 0.25, ALPHA)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("x", {"mean": 1.0}),
        ("carrier", {"words": (0.1, 0.3, 0.6)}),
        ("carrier", {"words": (0.0, 0.0, 0.0, 0.5, 0.5)}),
        ("flat", {"flat": 5.0}),
        ("flat", {"flat": 0.0}),
    ],
)
def test_a_column_that_changes_is_named_at_once_and_once(name, changed):
    random = np.random.default_rng(2)
    shifts = column_shifts(random)

    assert [judged(shifts, table(random, 500)) for _ in range(20)] == [[]] * 20
    assert judged(shifts, table(random, 500, **changed)) == [name]
    assert [judged(shifts, table(random, 500, **changed)) for _ in range(20)] == [[]] * 20
    assert judged(shifts, table(random, 500)) == [name], "the new world is the reference now"


def test_a_column_that_is_always_unlike_its_reference_alarms_only_beyond_its_habit():
    random = np.random.default_rng(4)
    shifts = column_shifts(random)
    for at in range(30):  # an hour's weather: each micro-batch holds a narrow piece of the year
        rows = table(random, 500, mean=np.sin(at))
        rows[:, 0] = rows[:, 0] * 0.1 + np.sin(at)
        assert "x" not in judged(shifts, rows), at


def test_a_new_reference_is_made_of_the_looks_that_follow():
    random = np.random.default_rng(2)
    shifts = column_shifts(random)
    for _ in range(LOOKS):
        judged(shifts, table(random, 500))
    judged(shifts, table(random, 500, mean=2.0))

    [first, *_] = shifts.state()
    assert (first["gathered"], first["reference"]) == (LOOKS, {})


# Kept and restored.


class Embedded(EmbeddingShift):
    """Rows that are embeddings already."""

    def add(self, rows):
        return super().add(rows, same)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: MeanShift(ALPHA), lambda random: random.beta(2, 5, ROWS)),
        (lambda: ScoreShift(ALPHA, 3), lambda random: random.beta(2, 5, ROWS)),
        (lambda: Embedded(ALPHA, 3), lambda random: random.normal(0, 1, (ROWS, 4))),
    ],
)
def test_a_restored_detector_goes_on_bit_for_bit(make, draw):
    random, straight, other = np.random.default_rng(1), make(), make()
    for _ in range(7):
        straight.add(draw(random))
    other.restore(saved(straight.state()))
    batches = [draw(random) for _ in range(8)] + [0.5 + 0.5 * draw(random) for _ in range(3)]

    found = [straight.add(each) for each in batches]
    assert found == [other.add(each) for each in batches]
    assert any(each not in (None, (0.0, None)) for each in found)
    assert plain(straight.state()) == plain(other.state())


def plain(state):
    """A state that compares: arrays as bytes, a detector by what it says of itself."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return state.tobytes()
    width = getattr(state, "width", None)
    return state if width is None else (width, state.total, state.variance, state.n_detections)


def test_restored_columns_go_on_bit_for_bit():
    random = np.random.default_rng(1)
    straight = column_shifts(random)
    for _ in range(3):
        judged(straight, table(random, 500))
    other = column_shifts(np.random.default_rng(99))
    other.restore(saved(copy.deepcopy(straight.state())))
    batches = [table(random, 500, mean=mean) for mean in [0.0] * 4 + [1.0] * 12 + [0.0]]

    assert [judged(straight, each) for each in batches] == [judged(other, each) for each in batches]


# The shape of a change.


@pytest.mark.parametrize("seed", range(10))
def test_a_step_is_sudden_and_a_ramp_is_gradual(seed):
    noise = np.random.default_rng(seed).normal(0, 0.01, 16)
    step = np.r_[np.zeros(13), np.full(3, 0.3)] + noise
    ramp = np.r_[np.zeros(6), np.linspace(0.03, 0.3, 10)] + noise

    assert (drift.is_gradual(step), drift.is_gradual(ramp)) == (False, True), f"seed {seed}"


@pytest.mark.parametrize("levels", [[], [0.2], [0.2, 0.5], [0.2, 0.2, 0.2, 0.6]])
def test_a_change_of_one_level_is_sudden(levels):
    assert not drift.is_gradual(np.array(levels))
