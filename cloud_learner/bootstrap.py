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
from cloud_learner.evaluate.offline import EvaluationSet, Words, save_set
from cloud_learner.evaluate.slices import Keys
from cloud_learner.experiment.features import featured
from cloud_learner.experiment.pretraining import pretrain
from cloud_learner.experiment.replay import DataRow, read_rows
from cloud_learner.gate import Gate, Judgement
from cloud_learner.judging import passed_before
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.releasing import Releases, release_signers
from cloud_learner.rollout.state import Offer
from cloud_learner.rules import campaign_rules, gate_limits
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.train.dataset import Matrix, Rows, groups_of
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
    home.check_gate_is_here()
    if home.root.exists():
        with home.owned():  # who may not have it hears that before the rows are read
            pass
    rows, learned_through_s = labelled_rows(family, data)
    if len(rows) < ROWS_MIN:
        raise ConfigError("too_few_rows", f"{data} has {len(rows)} labelled rows of {ROWS_MIN}")
    tell(f"{len(rows):,} labelled rows from {data.name}, features by the device's engine")
    if constants := family.constants(rows.features):
        tell(f"never change, so nothing is learned from them: {', '.join(constants)}")
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
    family: Family, rows: EvaluationSet, learned_through_s: float, home: Home, tell: Tell
) -> Judgement:
    learned, static = rows.set_aside(STATIC_SHARE, family.config.learning.seed)
    cycle = Cycle(family, learned.features[:REFERENCE_ROWS])
    pretrain(cycle, Rows(learned.features, learned.labels, groups=learned.groups), tell)
    cycle.remember(learned)
    candidate = cycle.candidate()
    own = home.of(family.name)
    own.root.mkdir(parents=True, exist_ok=True)
    save_set(own.static, static)
    save_set(own.reference, EvaluationSet(learned.features[:REFERENCE_ROWS], np.zeros(0, "f4")))
    indices = [at for at, column in enumerate(family.spec.columns) if column.is_key]
    known = Keys.of(indices, learned)
    known.save(own.known)
    cycle.save(own.checkpoint)
    cycle.keep_graph(own.graph)
    part = Lineage(home.lineage).of(family.name)
    gate = Gate(gate_limits(family), static, None, part, known)
    judgement = gate.judge(candidate.package, candidate.float_package, None)
    if judgement.outcome != "pass":
        raise RefusedError(
            "gate_refused",
            f"the first release of {family.name} did not pass, so {home.root} does not have it:"
            f" {judgement.why_not}",
            "mend data, network or [gates], and do it again; all verdicts are in its lineage/",
        )
    first = asyncio.run(_sign(family, home, candidate, judgement, tell))
    folder = str(family.folder.resolve())
    own.write_origin(Origin(family.name, folder, learned_through_s, first.release, first.sha256))
    tell(f"release {first.release} passed the gate and is signed by learner and gate")
    return judgement


def labelled_rows(family: Family, data: Path) -> tuple[EvaluationSet, float]:
    """All predicting rows with a label, their features by one engine a device; the last time."""
    found, features, newest_s = [], [], 0.0
    rows = read_rows(data, family.interface, task=family.config.task)
    for row, vector in featured(rows, family.interface, family.spec):
        if vector is not None:
            features.append(vector)
            found.append(row)
        newest_s = row.time_s
    table = np.stack(features) if features else np.zeros((0, family.spec.size), np.float32)
    return _as_set(family, found, table), newest_s


def _as_set(family: Family, rows: list[DataRow], features: Matrix) -> EvaluationSet:
    group, slices = family.config.task.group, family.config.gates.slices
    told = family.config.session_field
    times_s = np.array([row.time_s for row in rows], np.float64)
    known_s = np.array([row.label_time_s for row in rows], np.float64)
    return EvaluationSet(
        features,
        np.array([row.label for row in rows], np.float32),
        groups_of([row.fields for row in rows], group) if group else np.zeros(len(rows), np.int64),
        times_s,
        known_s - times_s,
        devices=Words.of(row.device for row in rows),
        fields={name: Words.of(f"{row.fields.get(name, '')}" for row in rows) for name in slices},
        sessions=Words.of(f"{row.fields.get(told, '')}" for row in rows if told),
    )


async def _sign(
    family: Family,
    home: Home,
    candidate: Candidate,
    judgement: Judgement,
    tell: Callable[[str], None],
) -> Offer:
    """Offer the candidate to a campaign whose publisher signs to disk; nobody listens yet.

    A bootstrap that was killed may have come this far: then what it has signed is the first.
    """
    clock, lineage = SystemClock(), Lineage(home.lineage)
    keys.admit(home.root, family.name, tell=tell)
    release = Releases(family.name, Registry(home.registry), lineage.of(family.name))
    bus = await MemoryBroker().connect(name="bootstrap")
    known = {name: passed_before(lineage.of(name)) for name in (*home.families(), family.name)}
    signers = release_signers(home, lambda name, sha256: known.get(name, {}).get(sha256))
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
