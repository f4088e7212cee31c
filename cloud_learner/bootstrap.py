"""The bootstrap: from a data file to the first signed release.

Why: a fleet needs a model before it can have a stream; what lies in files today is history that
went through no device, so it goes through the device's engine here.

Invariants: the first release passes the same gate and is signed by the same keys as every later
one. One row in eight is set aside before anything is learned and never trained on. The home becomes
a home with the last write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cloud_learner.config import Home, Origin
from cloud_learner.controller import Controller
from cloud_learner.cycle import Candidate, Cycle
from cloud_learner.evaluate.offline import EvaluationSet, save_set
from cloud_learner.experiment.features import featured
from cloud_learner.experiment.replay import read_rows
from cloud_learner.gate import Gate, Judgement
from cloud_learner.host import Releases, campaign_rules, gate_limits, release_signers
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import SystemClock
from edge_runtime.errors import ConfigError, PackageError

STATIC_SHARE = 8  # one row in so many is the static test set
REFERENCE_ROWS = 5000
ROWS_MIN = 200

Tell = Callable[[str], None]


class RefusedError(PackageError):
    """The gate did not pass the first candidate."""


def bootstrap(folder: Path, data: Path, home: Home, tell: Tell) -> Judgement:
    """Learn from `data`, gate and sign the first release into `home`.

    Raises: ConfigError (bad family, data or home), RefusedError when the gate says no.
    """
    family = Family.load(folder)
    if (home.root / "bootstrap.json").exists():
        raise ConfigError(
            "home_exists", f"{home.root} is already a home; it is unchanged", "give another --home"
        )
    rows, learned_through_s = labelled_rows(family, data)
    if len(rows) < ROWS_MIN:
        raise ConfigError("too_few_rows", f"{data} has {len(rows)} labelled rows of {ROWS_MIN}")
    tell(f"{len(rows):,} labelled rows from {data.name}, features by the device's engine")
    if constants := family.constants(rows.features):
        tell(f"never change, so nothing is learned from them: {', '.join(constants)}")
    learned, static = _split(rows, family.config.learning.seed)
    cycle = Cycle(family, learned.features[:REFERENCE_ROWS])
    cycle.pretrain(learned)
    candidate = cycle.candidate()
    home.root.mkdir(parents=True, exist_ok=True)
    save_set(home.static, static)
    save_set(home.reference, EvaluationSet(learned.features[:REFERENCE_ROWS], np.zeros(0, "f4")))
    cycle.save(home.checkpoint)
    cycle.keep_graph(home.graph)
    gate = Gate(gate_limits(family), static, None, Lineage(home.lineage))
    judgement = gate.judge(candidate.package, candidate.float_package, None)
    if judgement.outcome != "pass":
        reasons = "; ".join(v.reason for v in judgement.verdicts if v.outcome != "pass")
        raise RefusedError("gate_refused", f"the first release did not pass: {reasons}")
    release = asyncio.run(_sign(family, home, candidate, judgement, gate))
    home.write_origin(
        Origin(family.name, str(folder.resolve()), learned_through_s, release, judgement.sha256)
    )
    tell(f"release {release} passed the gate and is signed by learner and gate")
    return judgement


def labelled_rows(family: Family, data: Path) -> tuple[Rows, float]:
    """All predicting rows with a label, their features by one engine a device; the last time."""
    features, labels, newest_s = [], [], 0.0
    rows = read_rows(data, family.interface, task=family.config.task)
    for row, vector in featured(rows, family.interface, family.spec):
        if vector is not None:
            features.append(vector)
            labels.append(row.label)
        newest_s = row.time_s
    table = np.stack(features) if features else np.zeros((0, family.spec.size), np.float32)
    return Rows(table, np.array(labels, np.float32)), newest_s


def _split(rows: Rows, seed: int) -> tuple[Rows, EvaluationSet]:
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = len(rows) // STATIC_SHARE
    static = rows.take(np.sort(order[:cut]))
    return rows.take(order[cut:]), EvaluationSet(static.features, static.labels)


async def _sign(
    family: Family, home: Home, candidate: Candidate, judgement: Judgement, gate: Gate
) -> str:
    """Offer the candidate to a campaign whose publisher signs to disk; nobody listens yet."""
    clock, lineage = SystemClock(), Lineage(home.lineage)
    keys.create(home.root, [family.name])
    release = Releases(family.name, Registry(home.registry), lineage)
    offer = release.register(candidate, judgement)
    bus = await MemoryBroker().connect(name="bootstrap")
    publisher = Publisher(home.root, bus, release_signers(home, gate), clock)
    publish = release.publishing(publisher)
    controller = Controller(campaign_rules(family), home.campaign, publish, lineage, clock)
    await controller.start()
    await controller.offer(offer)
    await controller.close()
    await bus.close()
    return offer.release
