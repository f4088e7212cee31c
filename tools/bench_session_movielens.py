"""Real ratings of people whom the model never saw: MovieLens small.

Why: what a head is worth shows only on real people, in the order in which they rated.

How: the three users in ten who came last are new; beside them, three in ten drawn at random. The
others teach a factor model, by alternating least squares with regularisation by count (Zhou et al.
2008). Its answer is the same for everyone: the mean with the item's bias. Its embedding of an item
is factors, bias, popularity and genres. The prior comes of the same users, each under a model that
was learned without them: a factor that knows a user's ratings makes no stranger of that user.
Each rating of a new user is answered before it is told.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from bench_rows import Row

from cloud_learner.train.prior import PastSession, learn_prior
from edge_runtime.personal.head import Head
from edge_runtime.personal.prior import Prior

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

WIDTH, ROUNDS, FOLDS = 16, 10, 4
RIDGE, ITEM_RIDGE, USER_RIDGE = 0.08, 8.0, 5.0
REGION = 2.5  # stars
SEEN_MAX = 60
REACH = {"1-2": -6.0, "5-9": -9.5, "20-39": None, "40-60": -15.0}
WHAT = "MovieLens small, users never seen in training, RMSE against the frozen model"


@dataclass
class Ratings:
    """Columns in order of users, and of time within each; genres of each item as 0 and 1."""

    users: Numbers
    items: Numbers
    stars: Floats
    times: Floats
    genres: Floats

    def of(self, users: Numbers) -> Ratings:
        kept = np.isin(self.users, users)
        columns = self.users[kept], self.items[kept], self.stars[kept], self.times[kept]
        return Ratings(*columns, self.genres)


@dataclass
class Model:
    """What is frozen: a base output and an embedding of each item."""

    bases: Floats
    factors: Floats
    context: Floats

    def session(self, ratings: Ratings, user: int) -> PastSession:
        own = np.flatnonzero(ratings.users == user)[: SEEN_MAX + 1]
        items = ratings.items[own]
        embeddings = np.hstack([self.factors[items], self.context[items]]).astype(np.float32)
        bases, stars = self.bases[items], ratings.stars[own]
        return PastSession(embeddings, bases.astype(np.float32), stars.astype(np.float32))


def measure(seed: int, drawn: int) -> list[Row]:
    """Raises: FileNotFoundError when the data are not there."""
    ratings = load(Path(os.environ.get("HEADWATER_DATA", _BESIDE)) / "movielens_small")
    people = int(ratings.users.max()) + 1
    first_s = np.full(people, np.inf)
    np.minimum.at(first_s, ratings.users, ratings.times)
    found = changes(ratings, np.argsort(first_s, kind="stable"))
    rows = [
        Row(f"{WHAT}: base unchanged at 0, share of answers that differ", found["0"], "", 0),
        *(Row(f"{WHAT}: after {span}", found[span], "%", reach) for span, reach in REACH.items()),
        Row(f"{WHAT}: sessions that fell back to it", 100 * found["fell"], "%"),
    ]
    orders = [np.random.default_rng(seed + n).permutation(people) for n in range(drawn)]
    others = [changes(ratings, order) for order in orders]
    return rows + [
        Row(
            f"the same with users drawn at random, mean of {drawn}: after {span}",
            float(np.mean([other[span] for other in others])),
            "%",
        )
        for span in (REACH if drawn else ())
    ]


_BESIDE = Path(__file__).parents[1] / "../shared/data"


def load(path: Path) -> Ratings:
    columns = np.loadtxt(path / "ratings.csv", delimiter=",", skiprows=1)
    columns = columns[np.lexsort((columns[:, 3], columns[:, 0]))]
    users = np.unique(columns[:, 0], return_inverse=True)[1]
    ids, items = np.unique(columns[:, 1], return_inverse=True)
    with (path / "movies.csv").open(encoding="utf-8", newline="") as file:
        named = {int(row["movieId"]): row["genres"].split("|") for row in csv.DictReader(file)}
    names = sorted({genre for genres in named.values() for genre in genres})
    genres = np.array([[name in named[int(item)] for name in names] for item in ids], float)
    return Ratings(users, items, columns[:, 2], columns[:, 3], genres)


def changes(ratings: Ratings, order: Numbers) -> dict[str, float]:
    """By interactions so far, by how many percent RMSE changes for the last users of `order`."""
    known, new = np.split(order, [len(order) * 7 // 10])
    model = fit(ratings.of(known))
    prior = learn_prior("regression", past_sessions(ratings, known, model), REGION)
    runs = [errors(prior, model.session(ratings, user)) for user in new]
    found = {
        "fell": float(np.mean([head.falls > 0 for _, _, head in runs])),
        "0": float(np.mean([frozen[0] != adapted[0] for frozen, adapted, _ in runs])),
    }
    for span in REACH:
        first, last = map(int, span.split("-"))
        frozen, adapted = (
            np.concatenate([run[part][first : last + 1] for run in runs]).mean() for part in (0, 1)
        )
        found[span] = 100 * (float(adapted / frozen) ** 0.5 - 1)
    return found


def fit(ratings: Ratings) -> Model:
    """Of what some users rated; an item that none of them rated has no bias and no factors."""
    count, people = len(ratings.genres), int(ratings.users.max()) + 1
    mean, rated = ratings.stars.mean(), np.bincount(ratings.items, minlength=count)
    bias = np.bincount(ratings.items, ratings.stars - mean, count) / (rated + ITEM_RIDGE)
    left = ratings.stars - mean - bias[ratings.items]
    given = np.bincount(ratings.users, minlength=people)
    left -= (np.bincount(ratings.users, left, people) / (given + USER_RIDGE))[ratings.users]
    factors = np.random.default_rng(1).normal(0, 0.1, (count, WIDTH))
    for _ in range(ROUNDS):
        tastes = solve(ratings.users, factors[ratings.items], left, people)
        factors = solve(ratings.items, tastes[ratings.users], left, count)
    popular = (np.log1p(rated) - 3) / 2
    return Model(mean + bias, factors, np.column_stack([bias, popular, ratings.genres / 2]))


def solve(groups: Numbers, rows: Floats, targets: Floats, count: int) -> Floats:
    """Ridge regression of each group's targets on its rows, of shape (count, WIDTH)."""
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups, minlength=count))[:-1]
    solved = np.zeros((count, WIDTH))
    for number, own in enumerate(np.split(order, ends)):
        if len(own):
            square = rows[own].T @ rows[own] + RIDGE * len(own) * np.eye(WIDTH)
            solved[number] = np.linalg.solve(square, rows[own].T @ targets[own])
    return solved


def past_sessions(ratings: Ratings, known: Numbers, model: Model) -> list[PastSession]:
    """The known users' sessions, each under a model that did not know them.

    Factors have no directions of their own: each model's are turned to those of `model`.
    """
    sessions = []
    for fold in range(FOLDS):
        others = fit(ratings.of(known[np.arange(len(known)) % FOLDS != fold]))
        left, _, right = np.linalg.svd(others.factors.T @ model.factors)
        others.factors = others.factors @ (left @ right)
        sessions += [others.session(ratings, user) for user in known[fold::FOLDS]]
    return sessions


def errors(prior: Prior, session: PastSession) -> tuple[Floats, Floats, Head]:
    """Squared errors of the frozen model and of the head, each before the label was told."""
    head, frozen, adapted = Head(prior), [], []
    for embedding, base, label in zip(
        session.embeddings, session.bases.tolist(), session.labels.tolist(), strict=True
    ):
        frozen.append((base - label) ** 2)
        adapted.append((head.answer(embedding, base) - label) ** 2)
        head.adapt(embedding, base, label)
    return np.array(frozen), np.array(adapted), head
