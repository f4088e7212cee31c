"""Visitors whose tastes drift: what they click of what a session shows, against the frozen model.

How: the family `models/session_ranker` is bootstrapped from its simulator's past visits, as any
family is, and its package served by a device's runtime. New visitors come, and each sees ten pages
of eight stories that are ranked from forty. The frozen model is the same package without its
policy: all that was learned of stories and hours, and nothing of the visitor. The same visitors see
the pages of both, with the same luck. Beside them the list of the most clicked stories, and the
ranking of one who could read minds, which bounds what there is to gain.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_rows import Row

from cloud_learner.bootstrap import bootstrap
from cloud_learner.config import Home
from cloud_learner.store.registry import Registry
from cloud_learner.train.modules import load_module
from edge_runtime.runtime import Event, Runtime

FOLDER = Path(__file__).parents[1] / "models" / "session_ranker"
FAMILY, POLICY = "session_ranker", "headwater.personal"
FIRST_SEED = 1000  # of visits that nothing was tuned on; the past has others
VISIT_S, PAGE_S = 600.0, 30.0
SEEDS, VISITS = 5, 400
REACH = 12.0
WHAT = "simulator with drifting tastes: clicks per session"

simulator, data = (load_module(FOLDER / f"{name}.py") for name in ("simulator", "data"))


def measure(*, quick: bool) -> list[Row]:
    """With a model of the family's past visits; `quick`: of few, asked by few."""
    seeds, visits, past = (1, 20, 250) if quick else (SEEDS, VISITS, data.VISITS)
    with opened(past) as (adapting, frozen):
        found = clicks(seeds, visits, adapting, frozen)
    means = {way: float(each.mean()) for way, each in found.items()}
    gains = 100 * (found["session"].mean(1) / found["frozen"].mean(1) - 1)
    gain = 100 * (means["session"] / means["frozen"] - 1)
    listed = 100 * (means["popular"] / means["frozen"] - 1)
    return [
        Row(f"{WHAT} against frozen, {seeds} seeds", gain, "%", REACH, at_least=True),
        Row(f"{WHAT} against frozen, the least of the seeds", float(gains.min()), "%"),
        Row(f"{WHAT} against frozen, the seeds' standard deviation", float(gains.std()), "%"),
        Row(f"{WHAT}, popularity list against frozen", listed, "%"),
        Row(f"{WHAT}, with session.rank", means["session"], ""),
        Row(f"{WHAT}, the frozen model's ranking", means["frozen"], ""),
        Row(f"{WHAT}, popularity list", means["popular"], ""),
        Row(f"{WHAT}, tastes known beforehand", means["known"], ""),
    ]


@contextmanager
def opened(past: int) -> Iterator[tuple[Runtime, Runtime]]:
    """A runtime whose sessions adapt, and one whose package has no policy."""
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        home = Home(Path(folder) / "cloud")
        data.write_data(Path(folder) / "visits.csv", past)
        judged = bootstrap(FOLDER, Path(folder) / "visits.csv", home, lambda _text: None)
        package = Registry(home.registry).path(judged.sha256)
        bare = without_policy(package, Path(folder) / "frozen.onnx")
        with Runtime.open(package=package) as adapting, Runtime.open(package=bare) as frozen:
            yield adapting, frozen


def without_policy(package: Path, target: Path) -> Path:
    model = onnx.load(package)
    said = {each.key: each.value for each in model.metadata_props if each.key != POLICY}
    onnx.helper.set_model_props(model, said)
    onnx.save(model, target)
    return target


def clicks(seeds: int, visits: int, adapting: Runtime, frozen: Runtime) -> dict[str, Any]:
    """By way of ranking, clicks of shape (seeds, visits)."""
    with (FOLDER / "items.csv").open(newline="") as file:
        popular = {int(row["item"]): float(row["bias"]) for row in csv.DictReader(file)}
    ways: dict[str, Callable[[Any, float], int]] = {
        "session": lambda visit, time_s: ranked(adapting, visit, time_s),
        "frozen": lambda visit, time_s: ranked(frozen, visit, time_s),
        "popular": lambda visit, _time_s: listed(visit, popular),
        "known": lambda visit, _time_s: listed(visit, dict(enumerate(visit.chances))),
    }
    world = simulator.World.drawn()
    found = {way: np.zeros((seeds, visits)) for way in ways}
    for number in range(seeds * visits):
        at = divmod(number, visits)
        visit = simulator.Visit(world, (FIRST_SEED + at[0], at[1]))
        for way, look in ways.items():
            found[way][at] = look(visit, number * VISIT_S)
    return found


def ranked(runtime: Runtime, visit: Any, time_s: float) -> int:
    """Clicks of a visit whose pages `session.rank` makes; what is not looked at has no label."""
    session, total = runtime.session(FAMILY, visit.id), 0
    for page, offer in enumerate(visit.offers.tolist()):
        event = Event("shown", time_s + page * PAGE_S, {"visit": visit.id, "hour": visit.hour})
        shown = session.rank(event, [{"item": item} for item in offer], simulator.PLACES)
        clicked = visit.clicks(page, [offer[each.index] for each in shown])
        for each, label in zip(shown, clicked, strict=False):
            session.label(each.id, float(label), time_s=event.time_s)
        total += sum(clicked)
    session.close()
    return total


def listed(visit: Any, values: Mapping[int, float]) -> int:
    """Clicks of a visit whose pages show what has the highest of these values."""
    return sum(
        sum(visit.clicks(page, sorted(offer, key=values.__getitem__, reverse=True)))
        for page, offer in enumerate(visit.offers.tolist())
    )
