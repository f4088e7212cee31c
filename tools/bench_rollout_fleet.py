"""The fleets of tools/bench-rollout: whole devices that go back, and crowds of ten thousand.

Why: a promise about a fleet is kept or broken by fleets, not by formulas about them.

How: 200 whole devices in eight processes beside a real broker, all on this machine, so that what
they wait for each other is more than devices of their own would; crowds as numbers, a seed each,
with uneven devices, hours offline, sleepers, drift and labels half a day late.

Run by itself: .venv/bin/python tools/bench_rollout_fleet.py [--only PART ...] [--seeds N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402
from bench_rows import Row, machine, table  # noqa: E402

from cloud_learner.rollout.state import Rules  # noqa: E402
from cloud_learner.simulate.crowd import Crowd, Lies, Model, World  # noqa: E402
from cloud_learner.simulate.crowd_cycle import cycle_cost  # noqa: E402
from cloud_learner.simulate.crowd_trial import Course, campaign_over  # noqa: E402
from cloud_learner.simulate.rollout_fleet import Outcome, Site, roll_back  # noqa: E402

Part = Callable[[int], list[Row]]

SEEDS = 1000
BACK_S, CYCLE_S, FLEET_PERCENT, PAIRS = 10.0, 2.0, 25.0, 12_000
EQUAL, WORSE, DISASTER = Model(), Model(auc_lost=0.02), Model(failure_ratio=10.0)
CASES: dict[str, tuple[Model, Lies]] = {
    "worse": (WORSE, ""),
    "equal": (EQUAL, ""),
    "disaster": (DISASTER, ""),
    "equal, accused": (EQUAL, "harm"),
    "worse, praised": (WORSE, "praise"),
}


def fleet(seeds: int) -> list[Row]:
    """How long whole devices run what was found out; few of them where seeds are few."""
    devices, crews, asleep = (200, 8, 10) if seeds >= SEEDS else (12, 3, 2)
    with tempfile.TemporaryDirectory(prefix="hw-") as home:
        found = asyncio.run(_fleet(Path(home), devices, crews, asleep))
    what = "roll back decided to old release serving on every online device"
    p50, p99 = (float(np.quantile(found.back_s, q)) for q in (0.5, 0.99))
    return [
        Row(f"{what}, p99 of {len(found.back_s)}, all with traffic", p99, "s", BACK_S),
        Row(f"{what}, p50", p50, "s"),
        Row(f"{what}, the last one", max(found.back_s), "s"),
        Row("the same, killed in the middle and started again, the last one",
            max(found.killed_s), "s"),
        Row("asleep from before the trial until after it: from its start to the current plan",
            max(found.woken_s), "s"),
        Row("of these, devices that tried what was found out", found.woken_tried, "", 0),
        Row("requests of all devices that were not answered", found.failed, "", 0),
        Row("the last answer of the bad release after the decision", found.answered_s, "s"),
        Row("offered to on trial on every device, nothing known of it before", found.out_s, "s"),
        Row("memory of a process of devices, for each of them", found.rss_mb, "MB"),
    ]  # fmt: skip


async def _fleet(home: Path, devices: int, crews: int, asleep: int) -> Outcome:
    from bench_serving_model import FAMILY, Stream, write_package

    names = [f"device-{number}" for number in range(devices)]
    old, new = write_package(home / "old.onnx"), write_package(home / "new.onnx", 0.5)
    site = Site(home, names, crews, Stream().questions(1)[0], pace_s=1.0)
    async with site.open(Rules(family=FAMILY, selector={})):
        return await roll_back(site, old, new, asleep=asleep)


def crowd(seeds: int) -> list[Row]:
    """What campaigns over crowds of ten thousand come to, one for twenty-five seeds."""
    crowds = range(max(seeds // 25, 1))
    jobs = [(case, seed) for case in CASES for seed in crowds]
    context = get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        courses = dict(zip(jobs, pool.map(_course, *zip(*jobs, strict=True)), strict=True))
    by_case = {case: [courses[case, seed] for seed in crowds] for case in CASES}
    worse, equal, disaster = by_case["worse"], by_case["equal"], by_case["disaster"]
    stopped = "model that is 2 points AUC worse, labels delayed"
    lied = [
        (free.ending == "promoted") == (false.ending == "promoted")
        for case, other in (("equal, accused", equal), ("worse, praised", worse))
        for free, false in zip(other, by_case[case], strict=True)
    ]
    everything = list(courses.values())
    return [
        _share(f"{stopped}: stopped before 25 % of the fleet had it", 0.95,
               (c.ending != "promoted" and c.peak < FLEET_PERCENT for c in worse)),
        _share(f"{stopped}: the same, within 12,000 paired labels", 0.95,
               (c.ending != "promoted" and c.pairs <= PAIRS for c in worse)),
        _median(f"{stopped}: paired labels", "labels", (c.pairs for c in worse)),
        _median(f"{stopped}: most of the fleet that had it", "%", (c.peak for c in worse)),
        _share("equal model, the same crowds: promoted", None,
               (c.ending == "promoted" for c in equal)),
        _share("equal model, the same crowds: stopped for harm", None,
               (c.ending == "harm" for c in equal)),
        _median("equal model, the same crowds: days", "days", (c.days for c in equal)),
        _median("x10 disaster, the same crowds, reports each half hour: failures of the trial",
                "failures", (c.failures for c in disaster)),
        Row("exposure above the stage's share, moments of all these campaigns",
            sum(c.beyond for c in everything), "", 0),
        _share("forged or replayed reports from 1 % of devices: verdict unchanged", 1.0, lied),
    ]  # fmt: skip


def cycle(seeds: int) -> list[Row]:
    """What the controller computes for all devices once."""
    devices = 10_000 if seeds >= SEEDS else 500
    with tempfile.TemporaryDirectory(prefix="hw-") as home:
        cost = cycle_cost(Path(home), devices)
    what = f"{devices:,} devices, one campaign, whole controller cycle"
    return [
        Row(f"{what}: signed reports, labels, decision, plan", cost.cycle_s, "CPU s", CYCLE_S),
        Row(f"{what}, of it for signatures", cost.signatures_s, "CPU s"),
        Row(f"{what}, and one look at all of it", cost.status_s, "CPU s"),
    ]


PARTS: dict[str, Part] = {"fleet": fleet, "crowd": crowd, "cycle": cycle}


def _course(case: str, seed: int) -> Course:
    model, lies = CASES[case]
    course = campaign_over(Crowd(World(seed=seed, liars=0.01 if lies else 0.0, lies=lies), model))
    course.plans.clear()
    return course


def _share(what: str, reach: float | None, hits: Iterable[bool]) -> Row:
    found = list(hits)
    return Row(f"{what}, share of {len(found)} crowds", sum(found) / len(found), "", reach, True)


def _median(what: str, unit: str, values: Iterable[float]) -> Row:
    return Row(f"{what}, median", float(np.median(list(values))), unit)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts; default: all")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="fewer: small fleets")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for name in options.only or PARTS:
        print(f"{name} ...", file=sys.stderr)
        rows += PARTS[name](options.seeds)
    if options.json:
        print(json.dumps({"rows": [row.plain() for row in rows], "machine": machine()}))
    else:
        print(table(rows))
    return 0 if all(row.ok is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
