"""Real ratings of people whom the model never saw: MovieLens small, through the whole product.

Why: what a session is worth shows only on real people, in the order in which they rated.

How: the three users in ten who came last are new; beside them, three in ten drawn at random. The
others are the past of the family `models/session_ranker`, with its networks and its table of items,
asked for stars in place of clicks: replicas learn, a student follows, its package with embedding
and prior is served by a device's runtime, and new users come as sessions. The rows of a known user
are made with a table that was learned without that user, as one's own past has no part in what a
table said at the time; its factors are turned to those of the table that is served, since factors
have no directions of their own. The hour is told to nobody: of a few hundred people it says who.
Each rating of a new user is answered before it is told. The frozen model's answer is the base of
the same answer; beside it the mean with the item's bias, which is hard to beat without knowing who
asks.
"""

from __future__ import annotations

import csv
import os
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from bench_rows import Row

from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.offline import EvaluationSet, Words
from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module
from edge_runtime.features.spec import Spec
from edge_runtime.runtime import Event, Runtime

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

FOLDER = Path(__file__).parents[1] / "models" / "session_ranker"
FOLDS = 4
REGION = 2.5  # stars
SEEN_MAX = 60
NO_HOUR = -1
REACH = {"1-2": -6.0, "5-9": -9.5, "20-39": None, "40-60": -15.0}
WHAT = "MovieLens small, users never seen in training, RMSE against the frozen model"

items = load_module(FOLDER / "items.py")


@dataclass
class Ratings:
    """Columns in order of users, and of time within each; genres of each item as 0 and 1."""

    users: Numbers
    items: Numbers
    stars: Floats
    times: Floats
    genres: Floats
    names: list[str]

    def of(self, users: Numbers) -> Ratings:
        kept = np.isin(self.users, users)
        columns = self.users[kept], self.items[kept], self.stars[kept], self.times[kept]
        return Ratings(*columns, self.genres, self.names)

    def table(self) -> Floats:
        return items.facts(self.users, self.items, self.stars, self.genres)


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
        *(
            Row(f"{WHAT}: RMSE of {way}, all of them", found[way], "stars")
            for way in ("the frozen model", "sessions", "means with the item's bias")
        ),
        *(
            Row(f"the same against means with the item's bias: after {span}", found[other], "%")
            for span, other in ((span, f"plain {span}") for span in REACH)
        ),
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
    ids, numbers = np.unique(columns[:, 1], return_inverse=True)
    with (path / "movies.csv").open(encoding="utf-8", newline="") as file:
        named = {int(row["movieId"]): row["genres"].split("|") for row in csv.DictReader(file)}
    names = sorted({genre for genres in named.values() for genre in genres})
    genres = np.array([[name in named[int(item)] for name in names] for item in ids], float)
    return Ratings(users, numbers, columns[:, 2], columns[:, 3], genres, names)


def changes(ratings: Ratings, order: Numbers) -> dict[str, float]:
    """By interactions so far, by how many percent RMSE changes for the last users of `order`."""
    known, new = np.split(order, [len(order) * 7 // 10])
    past = ratings.of(known)
    mean, table = float(past.stars.mean()), past.table()
    plain = table[:, 0] * past.stars.std()
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        package = Path(folder) / "films.onnx"
        package.write_bytes(learned(ratings, known, table))
        with Runtime.open(package=package) as runtime:
            users = (ratings.of(np.array([user])) for user in new)
            runs, fell = zip(*(errors(runtime, user, mean, plain) for user in users), strict=True)
    found = {
        "fell": float(np.mean(fell)),
        "0": float(np.mean([frozen[0] != adapted[0] for frozen, adapted, _ in runs])),
    }
    for span in ("0-60", *REACH):
        first, last = map(int, span.split("-"))
        each = np.concatenate([run[:, first : last + 1] for run in runs], axis=1)
        frozen, adapted, means = np.sqrt(each.mean(1)).tolist()
        found[span] = 100 * (adapted / frozen - 1)
        found[f"plain {span}"] = 100 * (adapted / means - 1)
        if span == "0-60":
            found["the frozen model"], found["sessions"] = frozen, adapted
            found["means with the item's bias"] = means
    return found


def learned(ratings: Ratings, known: Numbers, table: Floats) -> bytes:
    """The package of a student of what the known users rated; `table` is theirs."""
    past = ratings.of(known)
    facts = np.zeros((len(past.users), table.shape[1]))
    for fold in range(FOLDS):
        others = ratings.of(known[np.arange(len(known)) % FOLDS != fold]).table()
        own = np.isin(past.users, known[fold::FOLDS])
        facts[own] = turned(others, table)[past.items[own]]
    features = np.column_stack([np.zeros(len(facts)), facts]).astype(np.float32)
    labels = (past.stars - past.stars.mean()).astype(np.float32)
    mixed = np.random.default_rng(1).permutation(len(labels))
    cycle = Cycle(family(ratings, table), features[mixed[:5000]])
    cycle.pretrain(Rows(features[mixed], labels[mixed]))
    places = np.arange(len(past.users)) - np.searchsorted(past.users, past.users)
    first = np.flatnonzero(places <= SEEN_MAX)
    users = Words.of(f"{user}" for user in past.users[first])
    known_rows = EvaluationSet(features[first], labels[first], times_s=past.times[first])
    cycle.remember(msgspec.structs.replace(known_rows, devices=users, sessions=users))
    return cycle.candidate().package


def turned(table: Floats, towards: Floats) -> Floats:
    """The table with its factors in the directions of another."""
    factors = slice(2, 2 + items.WIDTH)
    left, _, right = np.linalg.svd(table[:, factors].T @ towards[:, factors])
    turned = table.copy()
    turned[:, factors] = table[:, factors] @ (left @ right)
    return turned


def family(ratings: Ratings, table: Floats) -> Family:
    """The family as it is, over films, asked for stars above the mean."""
    config = Family.load(FOLDER).config
    columns = items.columns([f"genre {name}" for name in ratings.names])
    looked_up = [
        {"name": name, "lookup": {"table": "items", "key": "item", "column": name}}
        for name in columns
    ]
    hour = {"name": "hour", "field": "hour", "vocabulary": list(range(24))}
    rows = {f"{number}": row.tolist() for number, row in enumerate(table)}
    known = {"items": {"version": "1", "columns": columns, "rows": rows}}
    spec = Spec.from_document({"version": 1, "features": [hour, *looked_up], "tables": known})
    assert config.personal is not None
    people = len(np.unique(ratings.users))
    personal = msgspec.structs.replace(config.personal, region=REGION, memory=people)
    stars = msgspec.structs.replace(config, task=Task(kind="regression"), personal=personal)
    return Family(FOLDER, stars, spec, load_module(FOLDER / "network.py"))


def errors(runtime: Runtime, ratings: Ratings, mean: float, plain: Floats) -> tuple[Floats, bool]:
    """Squared errors of the frozen model, of a session before it is told, and of `plain` answers,
    of shape (3, ratings); and whether the session fell back.
    """
    found, user = [], f"{ratings.users[0]}"
    session = runtime.session("session_ranker", user)
    told = zip(ratings.items.tolist(), (ratings.stars - mean).tolist(), strict=True)
    for number, (item, label) in enumerate(islice(told, SEEN_MAX + 1)):
        fields = {"item": item, "visit": user, "hour": NO_HOUR}
        answer = session.predict(Event("shown", float(number), fields))
        answers = np.array([answer.base[0], answer.outputs[0], plain[item]])
        found.append((answers - label) ** 2)
        session.label(answer.id, label, time_s=float(number))
    fell = session.explain().falls > 0
    session.close()
    return np.stack(found, axis=1), fell
