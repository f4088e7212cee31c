"""What a prior is worth that comes of what devices export, and what a hostile one does to it.

Why: where events do not say whose they are, the cloud has nothing else to learn a prior from.

How: simulated people differ in a few directions of an embedding of 16 numbers together, and share
some taste; each of 20 devices meets 20 of them a release, of 12 labels each. The first release's
prior knows nothing: all directions alike. Each release's moments, as bytes, make the next one's, as
the learner's `Pooled` does it. New people are answered before each label is told. Beside it the
prior that the cloud would learn if it saw all these sessions itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from bench_rows import Row

from cloud_learner.train.pooled import Pooled
from cloud_learner.train.prior import STRENGTH, PastSession, learn_prior
from edge_runtime.personal.head import Head
from edge_runtime.personal.moments import DEVIATIONS_MAX, SESSIONS_MAX, Moments
from edge_runtime.personal.odds import loss_of, odds_of
from edge_runtime.personal.prior import Matrix, Prior

Floats = npt.NDArray[np.float64]

WIDTH, DIRECTIONS, REGION = 16, 3, 4.0
DEVICES, SESSIONS, LABELS = 20, 20, 12
RELEASES = 4
SPANS = {"1-2": (1, 2), "5-9": (5, 9)}
WHAT = "export: new sessions' log loss against the frozen model"


@dataclass
class People:
    """Whose weights are `mean` and, in a few directions together, something of their own."""

    mean: Floats
    root: Floats

    @classmethod
    def drawn(cls, chance: np.random.Generator) -> People:
        root = chance.normal(0, 1.2 / np.sqrt(DIRECTIONS), (WIDTH + 1, DIRECTIONS))
        return cls(chance.normal(0, 0.25, WIDTH + 1), root)

    def session(self, chance: np.random.Generator, labels: int = LABELS) -> PastSession:
        weights = self.mean + self.root @ chance.normal(size=DIRECTIONS)
        rows = chance.normal(0, 0.5, (labels, WIDTH)).astype(np.float32)
        odds = chance.normal(-0.5, 1, labels)
        told = chance.logistic(odds + weights[0] + rows @ weights[1:]) > 0
        bases = 1 / (1 + np.exp(-odds))
        return PastSession(rows, bases.astype(np.float32), told.astype(np.float32))


def measure(seed: int, releases: int = RELEASES, new: int = 2000) -> list[Row]:
    """The rows of the part `export`."""
    chance = np.random.default_rng(seed)
    people, seen = People.drawn(chance), list[PastSession]()
    tests = [people.session(chance) for _ in range(new)]
    rows = worth("prior that knows nothing", nothing(), tests)
    honest = attacked = nothing(), 0.0
    for release in range(1, releases + 1):
        met = [[people.session(chance) for _ in range(SESSIONS)] for _ in range(DEVICES)]
        seen += [session for own in met for session in own]
        rows += moved(met) if release == 1 else []
        honest, attacked = pooled(*honest, met).next(), beside_one(*attacked, met).next()
        if release in (1, releases):
            what = f"prior of moments, release {release}"
            rows += worth(what, honest[0], tests)
            rows += worth(f"{what}, a hostile device among {DEVICES + 1}", attacked[0], tests)
    whole = learn_prior("binary", seen, REGION)
    return rows + worth("prior of the same sessions, seen whole", whole, tests)


def nothing() -> Prior:
    """All directions alike, as wide as people may be."""
    eye = np.eye(WIDTH + 1, dtype=np.float32)
    return Prior("binary", eye[0] * 0, eye, REGION, norm_max=20.0)


def pooled(prior: Prior, known: float, met: list[list[PastSession]]) -> Pooled:
    """What the learner makes of the devices' words; each has met people of its own."""
    found = Pooled(prior, known)
    for device, own in enumerate(met):
        found.take(f"device-{device}", told(prior, own))
    return found


def beside_one(prior: Prior, known: float, met: list[list[PastSession]], times: int = 1) -> Pooled:
    """The same, with one more device, which says the most that it can, so many times."""
    found = pooled(prior, known, met)
    for _ in range(times):
        found.take("hostile", loudest(prior))
    return found


def told(prior: Prior, sessions: list[PastSession]) -> bytes:
    moments = Moments.none(prior)
    for session in sessions:
        head = Head(prior)
        for each in _labels(session):
            head.adapt(*each)
        moments.add(head)
    return moments.encode()


def _labels(session: PastSession) -> list[tuple[Matrix, float, float]]:
    told = session.embeddings, session.bases.tolist(), session.labels.tolist()
    return list(zip(*told, strict=True))


def worth(name: str, prior: Prior, sessions: list[PastSession]) -> list[Row]:
    losses, rows = np.mean([_losses(prior, session) for session in sessions], axis=0), []
    for span, (first, last) in SPANS.items():
        frozen, adapted = losses[:, first : last + 1].mean(axis=1)
        what = f"{WHAT}: {name}, after {span} labels"
        rows.append(Row(what, 100 * float(adapted / frozen - 1), "%"))
    return rows


def _losses(prior: Prior, session: PastSession) -> Floats:
    """Log loss (frozen and adapted, labels), each before the label was told."""
    head, losses = Head(prior), []
    for embedding, base, label in _labels(session):
        answers = base, head.answer(embedding, base)
        losses.append([loss_of(odds_of(answer), label) for answer in answers])
        head.adapt(embedding, base, label)
    return np.array(losses).T


def moved(met: list[list[PastSession]]) -> list[Row]:
    """How far a hostile device takes the prior's mean, in deviations, and how far it could."""
    prior, rows = nothing(), []
    before, honest = pooled(prior, 0.0, met).next()
    for name, times in {"extreme moments": 1, "the same ten times": 10}.items():
        after, sessions = beside_one(prior, 0.0, met, times).next()
        share = (sessions - honest) / (sessions + STRENGTH)
        far = np.linalg.norm(prior.whitener @ (after.mean - before.mean))
        most = share * (DEVIATIONS_MAX + np.linalg.norm(prior.whitener @ before.mean))
        what = f"export: a hostile device of {DEVICES + 1}, {name}: the prior's mean moves by"
        rows.append(Row(what, float(far), "deviations", round(float(most), 3)))
    return rows


def loudest(prior: Prior) -> bytes:
    """All that a device can say without being refused: each weight out as far as is clipped."""
    loud, covariance = Moments.none(prior), prior.covariance.astype(np.float64)
    most = DEVIATIONS_MAX * covariance.sum(axis=0) / np.sqrt(covariance.sum())
    loud.sessions, loud.first = float(SESSIONS_MAX), SESSIONS_MAX * most
    loud.second = np.outer(loud.first, loud.first) / SESSIONS_MAX + SESSIONS_MAX * covariance
    return loud.encode()
