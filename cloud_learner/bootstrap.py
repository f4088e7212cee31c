"""The bootstrap: from a data file to the first signed release.

Why: a fleet needs a model before it can have a stream; what lies in files today is history that
went through no device, so it goes through the device's engine here.

Invariants: the first release passes the same gate and is signed by the same keys as every later
one. One row in eight is set aside before anything is learned and never trained on. A family is one
of the home's with the last write; to the families that the home has nothing happens.
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
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.releasing import (
    Releases,
    campaign_rules,
    gate_limits,
    passed_before,
    release_signers,
)
from cloud_learner.rollout.campaign import Offer
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
    """Learn from `data`, gate and sign the first release of a family into `home`.

    A home that is one already gets the family in addition.
    Raises: ConfigError (bad family, data or home), RefusedError when the gate says no.
    """
    family = Family.load(folder)
    _refuse_known(family, home)
    if home.root.exists():
        with home.owned():  # who may not have it hears that before the rows are read
            pass
    rows, learned_through_s = labelled_rows(family, data)
    if len(rows) < ROWS_MIN:
        raise ConfigError("too_few_rows", f"{data} has {len(rows)} labelled rows of {ROWS_MIN}")
    tell(f"{len(rows):,} labelled rows from {data.name}, features by the device's engine")
    with home.owned():
        _refuse_known(family, home)
        return _bootstrapped(family, rows, learned_through_s, home, tell)


def _refuse_known(family: Family, home: Home) -> None:
    if family.name in home.families():
        raise ConfigError(
            "family_exists",
            f"{home.root} has the family {family.name!r} already; it is unchanged",
            "give another --home, or the family another name",
        )


def _bootstrapped(
    family: Family, rows: Rows, learned_through_s: float, home: Home, tell: Tell
) -> Judgement:
    learned, static = _split(rows, family.config.learning.seed)
    cycle = Cycle(family, learned.features[:REFERENCE_ROWS])
    cycle.pretrain(learned)
    candidate = cycle.candidate()
    own = home.of(family.name)
    own.root.mkdir(parents=True, exist_ok=True)
    save_set(own.static, static)
    save_set(own.reference, EvaluationSet(learned.features[:REFERENCE_ROWS], np.zeros(0, "f4")))
    cycle.save(own.checkpoint)
    cycle.keep_graph(own.graph)
    gate = Gate(gate_limits(family), static, None, Lineage(home.lineage).of(family.name))
    judgement = gate.judge(candidate.package, candidate.float_package, None)
    if judgement.outcome != "pass":
        reasons = "; ".join(v.reason for v in judgement.verdicts if v.outcome != "pass")
        raise RefusedError("gate_refused", f"the first release did not pass: {reasons}")
    first = asyncio.run(_sign(family, home, candidate, judgement))
    folder = str(family.folder.resolve())
    own.write_origin(Origin(family.name, folder, learned_through_s, first.release, first.sha256))
    tell(f"release {first.release} passed the gate and is signed by learner and gate")
    return judgement


def labelled_rows(family: Family, data: Path) -> tuple[Rows, float]:
    """All predicting rows with a label, their features by one engine a device; the last time."""
    features, labels, newest_s = [], [], 0.0
    rows = read_rows(data, family.interface)
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


async def _sign(family: Family, home: Home, candidate: Candidate, judgement: Judgement) -> Offer:
    """Offer the candidate to a campaign whose publisher signs to disk; nobody listens yet.

    A bootstrap that was killed may have come this far: then what it has signed is the first.
    """
    clock, lineage = SystemClock(), Lineage(home.lineage)
    keys.admit(home.root, family.name)
    release = Releases(family.name, Registry(home.registry), lineage.of(family.name))
    bus = await MemoryBroker().connect(name="bootstrap")
    known = {name: passed_before(lineage.of(name)) for name in (*home.families(), family.name)}
    signers = release_signers(home, lambda name, sha256: sha256 in known.get(name, ()))
    publish = release.publishing(Publisher(home.root, bus, signers, clock))
    campaign, part = home.of(family.name).campaign, lineage.of(family.name)
    controller = Controller(campaign_rules(family), campaign, publish, part, clock)
    await controller.start()
    if controller.stable is None:
        await controller.offer(release.register(candidate, judgement))
    first = controller.stable
    assert first is not None
    await controller.close()
    await bus.close()
    return first
