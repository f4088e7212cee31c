"""The demo: the whole loop on real flights, with its faults, its report and its picture.

Why: one command that shows what Headwater is for, and proves it on the spot: bootstrap, live part,
comparison worlds, one table. The exit code says whether every number was reached.

Invariants: every number comes from what ran; what was not measured is not a number. A run starts
from an empty folder; the data file is made once and kept.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.console import Console

from cloud_learner.config import Home
from cloud_learner.console.figure import (
    STEP_S,
    WINDOW_S,
    ReleaseMark,
    Series,
    quality_figure,
    rolling_auc,
)
from cloud_learner.console.report import Report, WorldsAuc, judge, reached, write_report
from cloud_learner.console.result import result_table
from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.offline import is_held_out, load_set, probabilities
from cloud_learner.experiment import worlds
from cloud_learner.experiment.replay import read_rows
from cloud_learner.simulate.live import Live
from cloud_learner.simulate.recount import recount
from cloud_learner.simulate.watch import quantiles
from cloud_learner.stats.scores import auc
from cloud_learner.store.archive import Archive
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.raw import RawLog
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module
from edge_runtime.errors import ConfigError
from edge_runtime.inference.runner import Runner

FAMILY = Path("models/flight_delay")
DEVICES = ["EWR", "JFK", "LGA"]
FIRST_DAY = "2013-02-01"  # the bootstrap knows what came before
PREDICTIONS = 109_119  # January, which the bootstrap learned, and the three months after it
FAULTS = {
    "flip": "2013-02-20",
    "kill": "2013-03-08",
    "forge wrong key": "2013-03-20",
    "forge learner alone": "2013-04-02",
    "poison": "2013-04-12",
}


def run(var: Path, *, full: bool) -> int:
    """Run the demo below `var`; the exit code: 0 when every number was reached, else 1.

    Raises: ConfigError when something is not installed, HeadwaterError when the loop breaks.
    """
    if not FAMILY.is_dir():
        raise ConfigError("no_family", f"{FAMILY} is not here", "run it from the checkout's root")
    console = Console(stderr=True)
    home = Home(var / "cloud")
    data, january = _data_files(var.parent / "data", console)
    for folder in ("cloud", "devices", "broker"):
        shutil.rmtree(var / folder, ignore_errors=True)
    var.mkdir(parents=True, exist_ok=True)
    console.print("bootstrap: learn January, gate it, sign the first release")
    _bootstrap(january, home)
    family = Family.load(FAMILY)
    rows = list(read_rows(data, family.interface, limit_predictions=None if full else PREDICTIONS))
    console.print(f"live: {len(rows):,} events of {len(DEVICES)} airports, one process each")
    live = Live(var, home, family.interface)
    times = {name: _time_s(day) for name, day in FAULTS.items()}
    uvloop.run(live.run(rows, DEVICES, times))
    console.print("worlds: the same events, scored from the archive in three other ways")
    report = _evaluate(live, family, home, var, console)
    write_report(var / "report.json", report)
    lines = judge(report, full=full)
    table = result_table(
        lines,
        report=var / "report.json",
        picture=var / "report.svg",
        next_steps=[
            "cloud-learner demo --full      # the whole year",
            f"less {home.lineage / 'lineage.jsonl'}      # every verdict and decision",
            "cat models/README.md                   # how to make a family of your own",
        ],
    )
    Console().print(table)
    return 0 if reached(lines) else 1


def _data_files(folder: Path, console: Console) -> tuple[Path, Path]:
    """The year and its January, written once."""
    folder.mkdir(parents=True, exist_ok=True)
    source = load_module(FAMILY / "data.py")
    files = {folder / "flights-2013.parquet": None, folder / "flights-january.parquet": FIRST_DAY}
    for path, until in files.items():
        if not path.exists():
            console.print(f"data: {path}")
            temporary = path.with_suffix(".tmp")
            try:
                source.write_data(temporary, until)
            except FileNotFoundError as error:
                raise ConfigError("no_data", str(error)) from error
            temporary.rename(path)
    year, january = files
    return year, january


def _bootstrap(data: Path, home: Home) -> None:
    """In a process of its own, as an operator would."""
    command = [sys.executable, "-m", "cloud_learner.cli", "bootstrap", str(FAMILY), str(data)]
    done = subprocess.run(
        [*command, "--home", str(home.root)], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise ConfigError("bootstrap_failed", f"bootstrap ended with code {done.returncode}")


def _time_s(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()


def _evaluate(live: Live, family: Family, home: Home, var: Path, console: Console) -> Report:
    archive, raw = Archive(home.archive), RawLog(home.raw)
    past = worlds.history(archive, family)
    origin = home.of(family.name).origin()
    first = home.registry / f"{origin.sha256}.onnx"

    def progress(text: str) -> None:
        console.print(f"  {text}")

    static_frozen, static_continual = worlds.static_worlds(
        family, past, origin.learned_through_s, progress
    )
    scores: dict[str, Any] = {
        "static_frozen": static_frozen,
        "static_continual": static_continual,
        "windows_frozen": worlds.frozen(first, past),
        "windows_continual": past.served,
    }
    counted = past.times_s >= origin.learned_through_s
    overall = {name: auc(past.labels[counted], s[counted]) for name, s in scores.items()}
    series = _series(past, scores, overall, counted)
    quality_figure(series, _releases(archive, home), var / "report.svg")
    archived = recount(raw.replay())
    float_gap, teacher_gap = _gaps(family, home, past, counted)
    archive.close()
    raw.close()
    return _report(live, WorldsAuc(**overall), archived, float_gap, teacher_gap)


def _releases(archive: Archive, home: Home) -> list[ReleaseMark]:
    """When each decided release began to serve everywhere, or answered last."""
    table = archive.query(
        "SELECT scored[1].release, scored[1].arm, min(time_s), max(time_s) FROM examples"
        " GROUP BY ALL"
    ).fetchall()
    begun = {release: low for release, arm, low, _ in table if arm == "stable"}
    last = {release: high for release, arm, _, high in table if arm == "canary"}
    marks = []
    for decision in Lineage(home.lineage).read("decision"):
        release, promoted = decision["evidence"]["canary"], decision["reason"] == "promoted"
        if promoted and release in begun:
            marks.append(ReleaseMark(begun[release], "promoted"))
        elif not promoted and release in last:
            marks.append(ReleaseMark(last[release], "rolled back"))
    return marks


def _series(
    past: worlds.History, scores: dict[str, Any], overall: dict[str, float], counted: Any
) -> dict[str, Series]:
    series = {}
    for name, values in scores.items():
        ends_s, values_auc = rolling_auc(
            past.times_s[counted], past.labels[counted], values[counted], WINDOW_S, STEP_S
        )
        series[name] = Series(ends_s.tolist(), values_auc.tolist(), overall[name])
    return series


def _gaps(family: Family, home: Home, past: worlds.History, counted: Any) -> tuple[float, float]:
    """AUC that the last student loses to int8, and its int8 form to its teachers, held out rows."""
    own = home.of(family.name)
    cycle = Cycle(family, load_set(own.reference).features)
    cycle.restore(own.checkpoint)
    cycle.take_graph(own.graph)
    candidate = cycle.candidate()
    rows = [
        row
        for row in np.flatnonzero(counted).tolist()
        if is_held_out(worlds.example(family, past, row))
    ]
    labels, features = past.labels[rows], past.features[rows]
    found = {}
    for name, package in (("int8", candidate.package), ("float", candidate.float_package)):
        path = home.root / f"last-{name}.onnx"
        path.write_bytes(package)
        found[name] = auc(labels, probabilities(Runner(path), features))
    teacher = auc(labels, cycle.replicas.answers(features)[:, 0])
    return found["float"] - found["int8"], teacher - found["int8"]


def _report(
    live: Live, worlds_auc: WorldsAuc, archived: int, float_gap: float, teacher_gap: float
) -> Report:
    counts, status = live.player.statistics(), live.watch.status
    assert status is not None
    learner = status.counters
    p50_s, p99_s = quantiles(status.freshness_s)
    latency = live.watch.latency()
    lost = counts["events_lost_in_linger"]
    faults = live.faults
    return Report(
        predictions=counts["predictions"],
        elapsed_s=live.elapsed_s,
        auc=worlds_auc,
        events_answered=counts["events_answered"],
        events_archived=archived,
        events_lost_in_linger=lost,
        learned_twice=learner["learned_twice"],
        freshness_p50_s=p50_s if p50_s is not None else float("nan"),
        freshness_p99_s=p99_s if p99_s is not None else float("nan"),
        swap_failures=live.watch.counter("swap_failures") + live.watch.counter("requests_dropped"),
        predict_p50_us=latency.quantile(0.5),
        predict_p99_us=latency.quantile(0.99),
        int8_gap_auc=float_gap,
        candidates=learner["gate_judged"],
        releases=learner["rollout_decided"],
        promoted=learner["rollout_promoted"],
        micro_batches_skipped=learner["micro_batches_skipped"],
        offline_gate_stopped=int(bool(faults["flip"].ok)),
        canary_rolled_back=int(bool(faults["poison"].ok)),
        forged_refused=sum(bool(faults[name].ok) for name in faults if name.startswith("forge")),
        sigkill_recovered=bool(faults["kill"].ok) and counts["events_answered"] == archived + lost,
        details={
            "client_p50_us": counts["predict_p50_us"],
            "client_p99_us": counts["predict_p99_us"],
            "teacher_gap_auc": teacher_gap,
            "faults": {name: row.state for name, row in faults.items()},
            "player": counts,
            "learner": learner,
            "learner_archived": status.events_archived,
            "freshness_s": status.freshness_s,
            "decisions": live.watch.decisions(live.family),
        },
    )
