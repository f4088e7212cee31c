"""What devices tell of their sessions moves the next prior, each device by a bounded amount."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from cloud_learner.pooling import LOOK_EVERY_S, REASONS_MAX, Pooling, Served
from cloud_learner.rollout.journal import Fed, Signed
from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Rows
from cloud_learner.train.declaration import Personal
from cloud_learner.train.policy import PolicyLearner
from cloud_learner.train.pooled import CAP, KNOWN_MAX, Anchor, Pooled, facts_of
from cloud_learner.train.prior import STRENGTH
from edge_runtime.inference.runner import Runner
from edge_runtime.personal.head import Head
from edge_runtime.personal.moments import DEVIATIONS_MAX, SESSIONS_MAX, Moments
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior
from edge_runtime.wire import codec
from edge_runtime.wire.messages import WIRE_VERSION, Report, SessionMoments

WIDTH = 3
TASTES = np.array([0.6, -0.4, 0.0, 0.3])


def prior_of(mean: float = 0.0) -> Prior:
    eye = np.eye(WIDTH + 1, dtype=np.float32)
    return Prior("binary", np.full(WIDTH + 1, mean, np.float32), eye / 2, 3.0, norm_max=10.0)


def told_by(prior: Prior, seed: int, sessions: int = 20, labels: int = 15) -> bytes:
    """What a device's people say who are likely to share `TASTES`."""
    chance, moments = np.random.default_rng(seed), Moments.none(prior)
    for _ in range(sessions):
        head, weights = Head(prior), chance.normal(TASTES, 0.3)
        for row in chance.normal(0, 1, (labels, WIDTH)).astype(np.float32):
            likely = chance.logistic(weights[0] + row @ weights[1:]) > 0
            head.adapt(row, 0.5, float(likely))
        moments.add(head)
    return moments.encode()


def loud(prior: Prior, sessions: float = SESSIONS_MAX) -> bytes:
    """The most that a device can say without being refused, of all weights together."""
    moments, covariance = Moments.none(prior), prior.covariance.astype(np.float64)
    most = DEVIATIONS_MAX * covariance.sum(axis=0) / np.sqrt(covariance.sum())
    moments.sessions, moments.first = sessions, sessions * most
    moments.second = np.outer(moments.first, moments.first) / sessions
    moments.second += sessions * prior.covariance
    return moments.encode()


def claiming(prior: Prior, sessions: float) -> bytes:
    """The loudest word of a hundred sessions, with another number of them written on it."""
    version, digest, _, first, second = msgspec.msgpack.decode(loud(prior, 100.0))
    return msgspec.msgpack.encode([version, digest, sessions, first, second])


def test_the_prior_moves_towards_what_people_of_many_devices_have_in_common():
    pooled = Pooled(prior_of())
    for seed in range(10):
        pooled.take(f"device-{seed}", told_by(pooled.prior, seed))
    prior, sessions = pooled.next()

    assert sessions == 200
    assert np.linalg.norm(prior.mean - TASTES) < 0.5 * np.linalg.norm(TASTES)


def test_what_a_device_tells_later_is_added_and_its_newest_count():
    pooled = Pooled(prior_of())
    for seed in range(3):
        pooled.take("a", told_by(pooled.prior, seed))
    assert pooled.statistics() == {"moments_devices": 1, "moments_sessions": 60}
    pooled.take("a", loud(pooled.prior))

    assert pooled.statistics()["moments_sessions"] == SESSIONS_MAX
    assert pooled.next()[1] == CAP


@pytest.mark.parametrize("honest", [1, 2, 10])
def test_a_hostile_device_moves_the_prior_by_a_bounded_amount(honest):
    """As one device among them, however much it tells and however often."""
    prior = prior_of()
    alone, beside = Pooled(prior), Pooled(prior)
    for seed in range(honest):
        for pooled in (alone, beside):
            pooled.take(f"device-{seed}", told_by(prior, seed))
    for _ in range(10):
        beside.take("hostile", loud(prior))
    before, (after, sessions) = alone.next()[0], beside.next()

    assert sessions == 20 * (honest + 1)
    share = 20 / (20 * (honest + 1) + STRENGTH)
    moved = np.linalg.norm(prior.whitener @ (after.mean - before.mean))
    most = share * (DEVIATIONS_MAX + np.linalg.norm(prior.whitener @ before.mean))
    wider = np.linalg.eigvalsh(prior.whitener @ after.covariance @ prior.whitener.T)[-1]
    widest = 1 + share * DEVIATIONS_MAX**2
    print(f"beside {honest}: moved {moved:.2f} of {most:.2f} deviations, as wide as {wider:.1f}")
    assert moved <= 1.01 * most
    assert wider <= 1.01 * widest


def test_what_is_known_already_weighs_against_what_is_told_and_fades():
    prior = prior_of()
    moved = []
    for known in (0.0, 100.0, 1e9, -5.0, float("nan")):
        pooled = Pooled(prior, known)
        pooled.take("a", told_by(prior, 1))
        after, sessions = pooled.next()
        moved.append(float(np.abs(after.mean).max()))
        assert sessions == 20 + (min(known, KNOWN_MAX) if known > 0 else 0)

    assert moved[0] > 3 * moved[1] > 3 * moved[2] > 0
    assert moved[0] == moved[3] == moved[4]


def test_a_device_that_is_left_out_counts_for_nothing():
    pooled, alone = Pooled(prior_of()), Pooled(prior_of())
    for each in (pooled, alone):
        each.take("honest", told_by(pooled.prior, 1))
    pooled.take("quarantined", loud(pooled.prior))

    assert pooled.next(["quarantined"])[0].encode() == alone.next()[0].encode()
    assert pooled.next(["quarantined", "honest"]) == (pooled.prior, 0.0)


def test_the_device_heard_longest_ago_makes_room():
    word, size = told_by(prior_of(), 1), Moments.none(prior_of()).nbytes
    pooled = Pooled(prior_of(), bytes_max=3 * size + 10)
    for device in "abcad":
        pooled.take(device, word)

    assert pooled.statistics()["moments_devices"] == 3
    assert pooled.next("cad")[1] == 0


def test_a_variance_beyond_all_numbers_leaves_the_prior_as_it_was():
    prior = Prior("binary", prior_of().mean, 1.9e6 * prior_of().covariance, 3.0, norm_max=10.0)
    pooled = Pooled(prior)
    pooled.take("hostile", loud(prior))

    assert pooled.next() == (prior, 0.0)


@pytest.fixture
def package(write_package) -> Callable[..., Served]:
    """`package(release, prior)` writes a package whose sessions begin with `prior`."""

    def write(release: str, prior: Prior | None, **facts: object) -> Served:
        policy = None if prior is None else Policy(prior)
        return Served(release, write_package(policy=policy, facts=facts)[0])

    return write


@pytest.fixture
def pooling(toy_spec) -> Pooling:
    rows = np.random.default_rng(1).normal(size=(50, toy_spec.size)).astype(np.float32)
    return Pooling("toy", rows)


def said(data: bytes, release: str = "r1", family: str = "toy") -> list[SessionMoments]:
    return [SessionMoments(family, release, data)]


def test_an_anchor_begins_with_the_prior_that_serves_and_follows_what_is_told(pooling, package):
    prior, served = prior_of(), package("r1", prior_of())
    bare = pooling.anchor(served, 0.0)
    assert (bare.prior.digest, bare.sessions) == (prior.digest, 0)
    assert bare.embeddings.shape == (50, WIDTH)
    for seed in range(5):
        pooling.hear(f"device-{seed}", said(told_by(prior, seed)))
    assert pooling.anchor(served, 0.0) is bare  # a look was a moment ago
    anchor = pooling.anchor(served, LOOK_EVERY_S)

    assert anchor.sessions == 100
    assert np.abs(anchor.prior.mean - TASTES).max() < 0.3
    again = pooling.anchor(served, 2 * LOOK_EVERY_S)  # nobody told more
    assert again.prior.encode() == anchor.prior.encode()


def test_a_device_that_is_quarantined_later_counts_no_more(pooling, package):
    served = package("r1", prior_of())
    for device in ("a", "b"):
        pooling.hear(device, said(told_by(prior_of(), 1)))

    assert pooling.anchor(served, 0.0).sessions == 40
    assert pooling.anchor(served, LOOK_EVERY_S, ["b"]).sessions == 20
    assert pooling.anchor(served, 2 * LOOK_EVERY_S).sessions == 40


def test_what_a_package_says_of_its_anchor_is_read_again(pooling, package):
    anchor = Anchor(prior_of(), 70.5, np.zeros((1, WIDTH), np.float32))

    assert pooling.anchor(package("r1", prior_of(), **facts_of(anchor)), 0.0).sessions == 70.5
    assert facts_of(None) == {}


@pytest.mark.parametrize(("told", "known"), [(70.5, 70.5), (-3, 0), ("many", 0), (10**400, 200)])
def test_a_package_says_how_much_was_told_of_before_it(pooling, package, told, known):
    served = package("r1", prior_of(), sessions_told=told)

    assert pooling.anchor(served, 0.0).sessions == known
    pooling.hear("a", said(told_by(prior_of(), 1)))
    assert pooling.anchor(served, LOOK_EVERY_S).sessions == known + 20


def test_a_device_that_floods_replaces_its_own_words_alone(pooling, package):
    prior, served = prior_of(), package("r1", prior_of())
    pooling.hear("honest", said(told_by(prior, 1)))
    for _ in range(1000):
        pooling.hear("loud", said(loud(prior, 50)))

    assert pooling.anchor(served, 0.0).sessions == 40
    assert pooling.statistics() == {
        "moments_heard": 2,
        "moments_refused": 0,
        "moments_left_out": 999,
        "moments_waiting": 0,
        "moments_devices": 2,
        "moments_sessions": 70,
    }


def test_words_of_another_release_or_family_are_left_out(pooling, package):
    prior, served = prior_of(), package("r2", prior_of())
    pooling.hear("late", said(told_by(prior, 1), release="r1"))
    pooling.hear("other", said(told_by(prior, 1), release="r2", family="flights"))

    assert pooling.anchor(served, 0.0).sessions == 0
    assert pooling.statistics()["moments_left_out"] == 1


def test_another_release_begins_with_its_own_prior(pooling, package):
    first, second = package("r1", prior_of()), package("r2", prior_of(0.25))
    pooling.hear("a", said(told_by(prior_of(), 1)))
    assert pooling.anchor(first, 0.0).sessions == 20
    anchor = pooling.anchor(second, 0.0)

    assert (anchor.sessions, anchor.prior.mean[0]) == (0, 0.25)
    pooling.hear("a", said(told_by(prior_of(0.25), 1), release="r2"))
    assert pooling.anchor(second, LOOK_EVERY_S).sessions == 20


@pytest.mark.parametrize(
    "spoil",
    [
        lambda prior: b"",
        lambda prior: b"\x95",
        lambda prior: told_by(prior, 1)[:-1],
        lambda prior: told_by(prior_of(0.5), 1),
        lambda prior: claiming(prior, 1e9),
        lambda prior: claiming(prior, float("nan")),
        lambda prior: claiming(prior, 20.0),
        lambda prior: claiming(prior, 1e-3),
    ],
    ids=[
        "nothing",
        "no moments",
        "cut",
        "another prior",
        "too many",
        "NaN",
        "too heavy",
        "too few",
    ],
)
def test_what_is_no_moments_is_counted_with_its_reason_and_changes_nothing(pooling, package, spoil):
    prior, served = prior_of(), package("r1", prior_of())
    pooling.hear("honest", said(told_by(prior, 2)))
    pooling.hear("hostile", said(spoil(prior)))
    anchor = pooling.anchor(served, 0.0)
    alone = Pooled(prior)
    alone.take("honest", told_by(prior, 2))

    assert anchor.prior.encode() == alone.next()[0].encode()
    assert "nothing of them was counted" in pooling.refused["hostile"]
    assert pooling.statistics()["moments_refused"] == 1


def test_reasons_are_kept_of_so_many_devices_and_no_more(pooling, package):
    for number in range(2 * REASONS_MAX):
        pooling.hear(f"device-{number}", said(b"?"))
    pooling.anchor(package("r1", prior_of()), 0.0)

    assert list(pooling.refused) == [f"device-{n}" for n in range(REASONS_MAX, 2 * REASONS_MAX)]


@pytest.mark.parametrize("served", ["nothing", "no policy", "no package"])
def test_where_no_policy_serves_there_is_no_anchor(pooling, package, tmp_path, served):
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    release = {
        "nothing": Served(),
        "no policy": package("r1", None),
        "no package": Served("r1", tmp_path / "garbage.onnx"),
    }[served]
    pooling.hear("a", said(told_by(prior_of(), 1)))

    assert pooling.anchor(release, 0.0) is None


@pytest.fixture
def runner(write_package) -> Runner:
    """The next candidate: its embedding is four times that of `package`."""
    return Runner(write_package(policy=Policy(prior_of()), turn=4.0)[0])


def policies(pooling: Pooling) -> PolicyLearner:
    personal = Personal(region=2.0, group="visitor", forgetting=0.125)
    return PolicyLearner(personal, Task(kind="binary"), pooling._reference)


def test_without_sessions_of_its_own_the_cloud_goes_on_from_what_devices_told(
    pooling, package, runner
):
    assert policies(pooling).policy(runner) is None
    for seed in range(5):
        pooling.hear(f"device-{seed}", said(told_by(prior_of(), seed)))
    anchor = pooling.anchor(package("r1", prior_of()), 0.0)
    prior = policies(pooling).policy(runner, anchor).prior

    rows = pooling._reference
    before = anchor.embeddings @ anchor.prior.mean[1:] + anchor.prior.mean[0]
    after = runner.embed(rows)[0] @ prior.mean[1:] + prior.mean[0]
    np.testing.assert_allclose(after, before, atol=1e-2)
    assert anchor.prior.mean[0] > 0.3
    assert (prior.region, prior.forgetting) == (2.0, 0.125)
    assert np.linalg.norm(runner.embed(rows)[0], axis=1).max() < prior.norm_max


def test_what_devices_told_weighs_beside_the_clouds_own_sessions_as_many_as_they_are(
    pooling, package, runner
):
    learner, rows = policies(pooling), pooling._reference
    half = Rows(rows, np.tile([0.0, 1.0], 25).astype(np.float32))
    learner.remember(half, ["till"] * 50, [f"{n // 5}" for n in range(50)], range(50))
    served = package("r1", prior_of())
    alone = learner.policy(runner).prior.mean[0]
    assert learner.policy(runner, pooling.anchor(served, 0.0)).prior.mean[0] == alone
    found = []
    for seed in range(10):
        pooling.hear(f"device-{seed}", said(told_by(prior_of(), seed)))
        anchor = pooling.anchor(served, (seed + 1) * LOOK_EVERY_S)
        found.append(learner.policy(runner, anchor).prior.mean[0])

    assert alone + 0.1 < found[0] < found[-1] < anchor.prior.mean[0]


def test_an_embedding_of_another_width_begins_from_nothing(pooling, package, write_package):
    anchor = pooling.anchor(package("r1", prior_of()), 0.0)

    assert anchor.moved(np.zeros((50, WIDTH + 1), np.float32)) is None


def test_a_trials_journal_keeps_nothing_of_what_a_report_tells_of_sessions():
    bare = Report(WIRE_VERSION, "a", 1, 0.0, {}, [], 0, {}, {}, [], 0, 0)
    telling = msgspec.structs.replace(bare, moments=said(told_by(prior_of(), 1)))
    signed = Signed(codec.encode(telling), b"a signature")

    assert Fed.of_report(0.0, 1, bare, signed).signed is signed
    assert Fed.of_report(0.0, 1, telling, signed).told() == bare
