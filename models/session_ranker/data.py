"""The data of this family, from its simulator: visits that are over, and what they tell of items.

Why: a bootstrap needs a past. It is that of a site which knows nothing yet and shows stories in any
order.

Invariants: the same counts give the same files. The visits that the table of items comes from are
none of those in the data file, so a row's features never knew its label.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from cloud_learner.train.modules import load_module

FOLDER = Path(__file__).parent
simulator, items = (load_module(FOLDER / f"{name}.py") for name in ("simulator", "items"))

EARLIER, VISITS = 20_000, 2500
EARLIER_SEED, SEED = 1, 2  # of the visits; the simulated world is always the same
FIRST_DAY = datetime(2026, 1, 5, tzinfo=UTC)
VISITS_A_DAY = 250
SITES = ("north", "south", "west")
PAGE_S, GLANCE_S, CLICK_S = 30, 2, 1


def write_items(path: Path = FOLDER / "items.csv", visits: int = EARLIER) -> None:
    """Write the table that features.toml looks up, of `visits` earlier visits."""
    world = simulator.World.drawn()
    shown = [
        (number, item, clicked)
        for number in range(visits)
        for _, item, clicked in looked_at(simulator.Visit(world, (EARLIER_SEED, number)))
    ]
    whose, what, clicks = (np.array(column) for column in zip(*shown, strict=True))
    genres = world.facts[:, : len(simulator.GENRES)]
    rows = items.facts(whose, what, clicks.astype(float), genres)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["item", *items.columns(simulator.GENRES)])
        writer.writerows([n, *(f"{cell:.3g}" for cell in row)] for n, row in enumerate(rows))


def write_data(path: Path, visits: int = VISITS) -> int:
    """Write the data file (CSV) at `path`. Returns: the number of rows."""
    world = simulator.World.drawn()
    rows = sorted(row for n in range(visits) for row in _rows(n, world))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        fields = ["item", "visit", "hour"]
        writer.writerow(["event_time", "device", *fields, "label", "label_time"])
        writer.writerows(rows)
    return len(rows)


def looked_at(visit: simulator.Visit) -> Iterator[tuple[int, int, bool]]:
    """Page, item and whether it was clicked, of each that was looked at, in any order shown."""
    for page, offer in enumerate(visit.offers.tolist()):
        for item, clicked in zip(offer, visit.clicks(page, offer), strict=False):
            yield page, item, clicked


def _rows(number: int, world: simulator.World) -> Iterable[tuple[object, ...]]:
    visit = simulator.Visit(world, (SEED, number))
    within = np.random.default_rng((SEED, number, 1)).uniform(0, 3600)
    day, site = divmod(number, VISITS_A_DAY)
    began = FIRST_DAY + timedelta(days=day, hours=visit.hour, seconds=int(within))
    for place, (page, item, clicked) in enumerate(looked_at(visit)):
        at = began + timedelta(seconds=PAGE_S * page + GLANCE_S * place)
        known = at + timedelta(seconds=CLICK_S)
        device = SITES[site % len(SITES)]
        yield f"{at:%FT%TZ}", device, item, visit.id, visit.hour, int(clicked), f"{known:%FT%TZ}"


if __name__ == "__main__":
    if sys.argv[1:] == ["items"]:
        write_items()
    else:
        write_data(Path(sys.argv[1]))
