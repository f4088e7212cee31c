"""The head learns what the closed form says, and stays in its region whatever it is told."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.errors import PackageError, RequestError
from edge_runtime.personal.head import FALLS_MAX, Head
from edge_runtime.personal.history import ROWS_MAX
from edge_runtime.personal.prior import Prior

WIDTH = 8
TASKS = ("binary", "regression", "ranking")
HOSTILE = (math.nan, math.inf, -math.inf, 1e30, -1e30, 1e308, -0.0, 0.0, 1.0, 0.5, 7.0, -3.0)


def prior_of(task: str = "regression", *, width: int = WIDTH, **more) -> Prior:
    root = np.random.default_rng(1).normal(0, 0.3, (width + 1, width + 1))
    covariance = (root @ root.T + 0.02 * np.eye(width + 1)).astype(np.float32)
    covariance = (covariance + covariance.T) / 2
    given = {"region": 2.0, "norm_max": 50.0, "noise": 0.25, **more}
    return Prior(task, np.zeros(width + 1, np.float32), covariance, **given)


def embeddings(count: int, seed: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, (count, width)).astype(np.float32)


def labels_of(prior: Prior, rows: np.ndarray, seed: int) -> list[float]:
    """Labels of a person drawn from the prior, whom the model answers 0.5 (log odds 0)."""
    chance = np.random.default_rng(seed)
    root = np.linalg.cholesky(prior.covariance.astype(float))
    weights = prior.mean + root @ chance.normal(0, 1, len(prior.mean))
    shifts = weights[0] + rows @ weights[1:]
    if prior.task == "regression":
        return (0.5 + shifts + chance.normal(0, math.sqrt(prior.noise), len(rows))).tolist()
    return (chance.logistic(shifts) > 0).astype(float).tolist()


def base_of(prior: Prior) -> float:
    return 0.0 if prior.task == "ranking" else 0.5


def told(prior: Prior, count: int, seed: int = 3, columns: int = 0) -> Head:
    head, rows = Head(prior, columns), embeddings(count, seed, prior.width)
    for row, label in zip(rows, labels_of(prior, rows, seed), strict=True):
        head.adapt(row, base_of(prior), label, row[:columns] if columns else None)
    return head


def test_a_value_is_learned_as_ridge_regression_learns_it():
    prior = prior_of(region=100.0)
    rows, labels = embeddings(40, 3), labels_of(prior, embeddings(40, 3), 3)
    head = told(prior, 40)

    features = np.hstack([np.ones((40, 1)), rows.astype(float)])
    precision = np.linalg.inv(prior.covariance.astype(float)) + features.T @ features / 0.25
    mean = np.linalg.solve(precision, features.T @ (np.array(labels) - 0.5) / 0.25)
    np.testing.assert_allclose(head.mean, mean, atol=2e-3)
    np.testing.assert_allclose(head.covariance, np.linalg.inv(precision), atol=1e-4)
    assert head.answer(rows[0], 0.5) == pytest.approx(0.5 + features[0] @ mean, abs=5e-3)


def test_tastes_that_drift_are_followed_as_the_closed_form_follows_them():
    """What is known of the weights now: the labels' joint distribution, with no filter at all."""
    prior = prior_of(region=100.0, forgetting=0.2)
    rows, labels = embeddings(40, 3), labels_of(prior, embeddings(40, 3), 3)
    head = told(prior, 40)

    features = np.hstack([np.ones((40, 1)), rows.astype(float)])
    ages = np.arange(39, -1, -1)
    alike = 0.8 ** np.abs(ages[:, None] - ages)
    between = alike * (features @ prior.covariance @ features.T) + 0.25 * np.eye(40)
    with_now = 0.8**ages * (prior.covariance @ features.T)
    mean = with_now @ np.linalg.solve(between, np.array(labels) - 0.5)
    covariance = prior.covariance - with_now @ np.linalg.solve(between, with_now.T)
    np.testing.assert_allclose(head.mean, mean, atol=2e-3)
    np.testing.assert_allclose(head.covariance, covariance, atol=1e-4)


def test_what_is_forgotten_goes_back_to_the_prior_and_never_beyond():
    prior = replace(prior_of(forgetting=0.1), mean=np.full(WIDTH + 1, 0.2, np.float32))
    head, nowhere = told(prior, 30), np.zeros(WIDTH, np.float32)
    before = np.abs(head.mean - prior.mean)[1:]
    for _ in range(200):
        head.adapt(nowhere, 0.5, 0.5 + float(head.mean[0]))
        assert np.linalg.eigvalsh(prior.covariance.astype(float) - head.covariance)[0] > -1e-6

    assert (before > 0.01).any()
    np.testing.assert_allclose(head.mean[1:], prior.mean[1:], atol=0.05)
    assert Head.decode(head.encode(), prior).encode() == head.encode()


@pytest.mark.parametrize("task", TASKS)
def test_without_a_label_the_answer_is_the_models(task):
    prior = replace(prior_of(task), mean=np.ones(WIDTH + 1, np.float32))
    head = Head(prior)

    assert [head.answer(row, 0.3) for row in embeddings(20, 2)] == [0.3] * 20


@pytest.mark.parametrize("task", TASKS)
def test_people_like_those_of_the_prior_are_answered_better(task):
    prior, own, models = prior_of(task), 0.0, 0.0
    for seed in range(100):
        rows = embeddings(12, seed)
        labels = labels_of(prior, rows, seed)
        head = Head(prior)
        for row, label in zip(rows[:10], labels[:10], strict=True):
            head.adapt(row, base_of(prior), label)
        for row, label in zip(rows[10:], labels[10:], strict=True):
            shown = head.answer(row, base_of(prior))
            own += loss(task, shown, label)
            models += loss(task, base_of(prior), label)

    assert own < 0.95 * models


def loss(task: str, shown: float, label: float) -> float:
    if task == "regression":
        return (shown - label) ** 2
    chance = shown if task == "binary" else 1 / (1 + math.exp(-shown))
    return -math.log(chance if label else 1 - chance)


def test_probabilities_stay_probabilities():
    head = Head(prior_of("binary", patience=math.inf))
    row = embeddings(1, 1)[0]
    for _ in range(200):
        head.adapt(row, 0.99, 1.0)

    answers = [head.answer(row, base) for base in (0.0, 1e-12, 0.5, 0.999999, 1.0)]
    assert all(0 < answer <= 1 for answer in answers)
    assert answers == sorted(answers)
    assert answers[2] > 0.5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("patience", "forgetting"), [(math.log(100), 0.0), (math.inf, 0.0), (math.inf, 0.1)]
)
def test_no_session_leaves_the_trust_region(task, patience, forgetting):
    """10,000 labels: contradictions, nonsense, and whatever opposes what the head says."""
    prior = prior_of(task, patience=patience, forgetting=forgetting)
    chance = np.random.default_rng(11)
    head, seen = Head(prior), embeddings(64, 5)
    longest = seen[0] / np.linalg.norm(seen[0]) * np.float32(0.999 * prior.norm_max)
    worst = 0.0
    for number in range(10_000):
        row = longest if number % 5 == 0 else seen[number % 64]
        contrary = float(head.shift(row) <= 0)
        wild = number % 3 == 0
        label = HOSTILE[chance.integers(len(HOSTILE))] if wild else contrary
        base = HOSTILE[chance.integers(len(HOSTILE))] if number % 7 == 0 else 0.5
        head.adapt(row, base, label)
        worst = max(worst, abs(head.shift(row)), abs(head.shift(-longest)))

    assert 0 < worst <= prior.region
    assert np.isfinite(head.mean).all()
    assert np.isfinite(head.covariance).all()
    assert head.refused > 1000
    for scale in (1e3, 1e30, math.inf, math.nan):
        with np.errstate(invalid="ignore", over="ignore"):
            far = seen[0] * np.float32(scale)
        assert abs(head.shift(far)) <= prior.region


@pytest.mark.parametrize("forgetting", [0.0, 0.1])
def test_a_covariance_survives_many_labels(forgetting):
    head = told(prior_of(patience=math.inf, forgetting=forgetting), 5000)

    values = np.linalg.eigvalsh(head.covariance.astype(float))
    assert values[0] > -1e-6
    assert (head.covariance == head.covariance.T).all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("forgetting", [0.0, 0.1])
def test_nonsense_teaches_nothing(task, forgetting):
    head = told(prior_of(task, forgetting=forgetting), 5)
    before = head.mean.tobytes(), head.covariance.tobytes()
    row, far = embeddings(1, 4)[0], np.full(WIDTH, 1e25, np.float32)
    nonsense = [(row, 0.5, math.nan), (row, math.inf, 1.0), (far, 0.5, 1.0), (far * 0, math.nan, 1)]
    nonsense.append((np.full(WIDTH, np.nan, np.float32), 0.5, 1.0))
    if task != "regression":
        nonsense += [(row, 0.5, 1e30), (row, 0.5, -0.1)]

    assert [head.adapt(*each) for each in nonsense] == [False] * len(nonsense)
    assert head.refused == len(nonsense)
    assert (head.mean.tobytes(), head.covariance.tobytes()) == before


def opposed(head: Head, at_most: int = 2000) -> int:
    """Labels that deny whatever the head says, until it falls; how many that took."""
    rows, falls = embeddings(64, 4), head.falls
    for number in range(at_most):
        row = rows[number % 64]
        if not head.adapt(row, 0.5, float(head.shift(row) <= 0)):
            return number
        if head.falls > falls:
            return number + 1
    raise AssertionError("it never fell")


def test_a_session_that_is_denied_answers_as_the_model_does():
    wide = prior_of("binary")
    head = Head(replace(wide, covariance=4 * wide.covariance))
    for fall in range(1, FALLS_MAX + 1):
        opposed(head)
        assert head.falls == fall
        assert head.answer(embeddings(1, 4)[0], 0.3) == 0.3

    assert not head.adapt(embeddings(1, 4)[0], 0.5, 1.0)
    assert head.explain().with_model
    head.reset()
    assert head.adapt(embeddings(1, 4)[0], 0.5, 1.0)


@pytest.mark.parametrize("task", TASKS)
def test_honest_sessions_seldom_fall(task):
    prior = prior_of(task)
    fallen = sum(told(prior, 60, seed).falls > 0 for seed in range(300))

    assert fallen <= 6  # 3 are expected at most


def test_an_explanation_names_what_moved():
    prior = prior_of()
    head = told(prior, 30)
    said = head.explain()

    assert (said.labels, said.with_model) == (30, False)
    assert said.against < 0
    assert len(said.moved) == 5
    bias, strongest = said.moved[:2]
    assert (bias.weight, bias.now) == (0, float(head.mean[0]))
    moves = np.abs(head.mean) / np.sqrt(np.diagonal(prior.covariance))
    assert strongest.weight == 1 + np.argmax(moves[1:])
    assert strongest.before == 0
    assert strongest.now == pytest.approx(float(head.mean[strongest.weight]))
    assert strongest.sure < math.sqrt(prior.covariance[strongest.weight, strongest.weight])


def test_a_reset_forgets_everything():
    head = told(prior_of(), 30, columns=4)
    head.reset()

    assert head.encode() == Head(head.prior, 4).encode()


def test_labels_make_the_head_sure():
    row = embeddings(1, 3)[0]

    assert told(prior_of(), 20).deviation(row) < 0.5 * Head(prior_of()).deviation(row)


def test_a_session_of_64_numbers_is_small():
    prior = prior_of(width=64)

    assert Head(prior, 17).nbytes < 22 * 1024
    assert len(told(prior, 100, columns=17).encode()) < 14 * 1024


@pytest.mark.parametrize("task", TASKS)
def test_a_restart_changes_no_bit(task):
    head = told(prior_of(task), 30, columns=4)
    back = Head.decode(head.encode(), prior_of(task))
    row = embeddings(1, 9)[0]
    for each in (head, back):
        each.adapt(row, 0.5, 1.0, row[:4])

    assert back.encode() == head.encode()
    assert back.answer(row, 0.4) == head.answer(row, 0.4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-9],
        lambda data: data[:1] + b"\x63" + data[2:],  # another version
        lambda data: data.replace(b"\xc4\x24", b"\xc4\x20", 1),
    ],
)
def test_a_state_that_cannot_be_read_is_refused(spoil):
    head = told(prior_of(), 3, columns=4)

    with pytest.raises(RequestError) as caught:
        Head.decode(spoil(head.encode()), head.prior)

    assert caught.value.code == "bad_session"


def turned(width: int = WIDTH) -> np.ndarray:
    """A rotation: another embedding in which the same can be said."""
    return np.linalg.qr(np.random.default_rng(8).normal(0, 1, (width, width)))[0].astype(np.float32)


def rebased(head, prior, embed):
    moved = head.carried(prior)
    moved.catch_up(embed)
    return moved


def test_a_new_release_in_another_embedding_answers_alike():
    prior, turn = prior_of(), turned()
    head = told(prior, 30, columns=WIDTH)
    whole = np.eye(WIDTH + 1, dtype=np.float32)
    whole[1:, 1:] = turn
    covariance = whole.T @ prior.covariance @ whole
    other = replace(prior, covariance=(covariance + covariance.T) / 2)
    moved = rebased(head, other, lambda rows: (rows @ turn, np.full(len(rows), 0.5, np.float32)))

    probes = embeddings(100, 9)
    before = [head.answer(row, 0.5) for row in probes]
    after = [moved.answer(row @ turn, 0.5) for row in probes]
    assert moved.labels == 30
    np.testing.assert_allclose(after, before, atol=2e-3)


def test_a_long_session_does_not_jump_for_what_its_history_has_forgotten():
    prior = prior_of()
    head = told(prior, 300, columns=WIDTH)
    moved = rebased(head, prior, lambda rows: (rows, np.full(len(rows), 0.5, np.float32)))

    probes = embeddings(100, 9)
    jumps = [abs(head.answer(row, 0.5) - moved.answer(row, 0.5)) for row in probes]
    assert moved.labels == ROWS_MAX
    assert max(jumps) < 3 * max(moved.deviation(row) for row in probes)


def test_what_has_no_history_begins_anew_on_a_new_release():
    head = told(prior_of(), 30)
    moved = rebased(head, prior_of(region=1.0), embed=None)

    assert (moved.labels, moved.answer(embeddings(1, 9)[0], 0.5)) == (0, 0.5)


def test_a_state_of_another_release_keeps_its_history_and_learns_it_later():
    head = told(prior_of(), 10, columns=WIDTH)
    other = prior_of(region=1.0)

    def embed(rows):
        return rows, np.full(len(rows), 0.5, np.float32)

    back = Head.decode(head.encode(), other)
    assert (back.labels, back.is_behind) == (0, True)
    again = Head.decode(back.encode(), other)
    for each in (back, again):
        each.catch_up(embed)

    assert not back.is_behind
    assert back.encode() == again.encode() == rebased(head, other, embed).encode()


def test_a_model_that_cannot_be_run_leaves_the_history_to_be_learned():
    behind = told(prior_of(), 10, columns=WIDTH).carried(prior_of())
    before = behind.encode()

    def fails(rows):
        raise PackageError("run_failed", f"{len(rows)} rows")

    with pytest.raises(PackageError):
        behind.catch_up(fails)

    assert behind.encode() == before


def test_damaged_states_are_refused_or_stay_in_the_region():
    """5,000 states with some bytes changed; what is read in spite of it does no harm."""
    chance, prior = np.random.default_rng(1), prior_of("binary")
    data, probes = told(prior, 20, columns=4).encode(), embeddings(5, 3)
    read = 0
    for _ in range(5000):
        spoiled = bytearray(data)
        for _ in range(chance.integers(1, 4)):
            end = chance.choice((60, len(data)))
            spoiled[chance.integers(end)] = chance.integers(256)
        try:
            head = Head.decode(bytes(spoiled), prior)
        except RequestError:
            continue
        read += 1
        for probe in probes:
            head.adapt(probe, 0.5, 1.0, probe[:4])
            assert abs(head.shift(probe)) <= prior.region
        assert len(head.explain().moved) == 5

    assert 1000 < read < 4500
