"""The successor: the first release of a new feature spec, of a home that has released before.

Why: a new spec needs another network, other test sets and another reference; the fleet must come to
it as to any other release, on trial beside the one that serves.

What a bootstrap does, from the archive's examples under the new spec in place of a data file, and
with the home's own counter, lineage and campaign: rows that are held out are kept for the gate, one
of eight others becomes the static set, the rest is learned.

Invariants: nothing of the home is changed before the gate has passed the candidate. Commit point:
`FamilyHome.write_origin`, the last act; until then the home is of the old spec for whoever serves
it (see `rules.check_spec`), and the same call does everything again, with the same result.

Knows nothing about raw envelopes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import numpy as np

from cloud_learner.config import Home, Origin
from cloud_learner.controller import Controller
from cloud_learner.cycle import Candidate, Cycle
from cloud_learner.evaluate.holdout import HoldOut
from cloud_learner.evaluate.offline import EvaluationSet, Words, is_held_out, save_set
from cloud_learner.evaluate.slices import Keys
from cloud_learner.experiment.pretraining import pretrain
from cloud_learner.experiment.twins import examples_of, files_of
from cloud_learner.gate import Gate, Judgement
from cloud_learner.judging import passed_before
from cloud_learner.publisher import Publisher
from cloud_learner.releasing import Releases, release_signers
from cloud_learner.rules import campaign_rules, gate_limits, recent_hold_out
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.train.dataset import Rows, groups_of
from cloud_learner.train.family import Family
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import SystemClock
from edge_runtime.errors import ConfigError, PackageError

STATIC_SHARE = 8  # one row in so many, of those that are not held out
REFERENCE_ROWS = 5000
ROWS_MIN = 200
ROWS_MAX = 500_000
"""The newest so many examples are learned from: they are in memory all at once."""

_NEWEST = """
SELECT * FROM (
    SELECT * FROM examples
    WHERE family = '{family}' AND spec = '{spec}' AND final AND NOT coalesce(early, false)
    QUALIFY row_number() OVER (PARTITION BY device, epoch, seq ORDER BY revision DESC) = 1
    ORDER BY time_s DESC, device DESC, epoch DESC, seq DESC LIMIT {limit}
) ORDER BY time_s, device, epoch, seq
"""

Tell = Callable[[str], None]


class RefusedError(PackageError):
    """The gate did not pass the first candidate of a new spec."""


class Released(msgspec.Struct, frozen=True):
    """The release that came of it, and how many examples were learned, held out and set aside."""

    release: str
    counter: int
    learned: int
    held_out: int
    static: int
    judgement: Judgement


class _History(msgspec.Struct):
    rows: EvaluationSet
    hold_out: HoldOut
    held_out: int


def release(home: Home, family: Family, db: IngestDb, tell: Tell) -> Released:
    """Learn the archive's examples under the family's features; gate, sign and offer a release.

    Raises: ConfigError `too_few_rows`; RefusedError when the gate says no.
    """
    past = _history(home, family, files_of(db, family.name))
    if len(past.rows) < ROWS_MIN:
        raise ConfigError(
            "too_few_rows",
            f"{len(past.rows)} examples under the new features can be learned, {ROWS_MIN} are "
            "needed; the release that serves is unchanged",
            "serve the old features.toml on for a while, and call this again",
        )
    learned, static = past.rows.set_aside(STATIC_SHARE, family.config.learning.seed)
    tell(f"{len(learned):,} examples to learn, {past.held_out:,} held out, {len(static):,} static")
    cycle = Cycle(family, learned.features[:REFERENCE_ROWS])
    pretrain(cycle, Rows(learned.features, learned.labels, groups=learned.groups), tell)
    cycle.remember(learned)
    cycle.learn(Batch(db.meta().families[family.name].batch, []))  # the next one comes after it
    indices = [at for at, column in enumerate(family.spec.columns) if column.is_key]
    known = Keys.of(indices, learned)
    own, part = home.of(family.name), Lineage(home.lineage).of(family.name)
    gate = Gate(gate_limits(family), static, _recent(past, family), part, known)
    candidate = cycle.candidate()
    judgement = gate.judge(candidate.package, candidate.float_package, None)
    if judgement.outcome != "pass":
        raise _refused(judgement)
    save_set(own.static, static)
    save_set(own.reference, EvaluationSet(learned.features[:REFERENCE_ROWS], np.zeros(0, "f4")))
    known.save(own.known)
    past.hold_out.save(own.hold_out)
    cycle.keep_graph(own.graph)
    cycle.save(own.checkpoint)
    name, counter = asyncio.run(_offer(home, family, candidate, judgement))
    through_s, folder = own.origin().learned_through_s, str(family.folder.resolve())
    own.write_origin(Origin(family.name, folder, through_s, name, judgement.sha256))
    return Released(name, counter, len(learned), past.held_out, len(static), judgement)


def _recent(past: _History, family: Family) -> HoldOut | None:
    """The hold-out, where it is large enough to be judged on; a bootstrap has none either."""
    enough = len(past.hold_out.rows()) >= family.config.gates.recent_rows_min
    return past.hold_out if enough else None


def _history(home: Home, family: Family, names: list[str]) -> _History:
    """The newest examples under the family's spec, in order, those that are held out apart."""
    sql = _NEWEST.format(family=family.name, spec=family.spec.hash, limit=ROWS_MAX)
    hold_out, free, held_out = recent_hold_out(family), list[Example](), 0
    task = family.config.task
    for examples in examples_of(home.archive, names, sql):
        hold_out.add(examples)
        fit = [each for each in examples if not task.why_unfit(each.label)]
        kept = [each for each in fit if not is_held_out(each, task.group)]
        held_out += len(fit) - len(kept)
        free += kept
    return _History(_as_set(family, free), hold_out, held_out)


def _as_set(family: Family, examples: list[Example]) -> EvaluationSet:
    group, slices = family.config.task.group, family.config.gates.slices
    told = family.config.session_field
    features = np.frombuffer(b"".join(each.features for each in examples), "<f4")
    times_s = np.array([each.time_s for each in examples], np.float64)
    return EvaluationSet(
        features.reshape(-1, family.spec.size).astype(np.float32),
        np.array([each.label for each in examples], np.float32),
        groups_of([each.fields for each in examples], group) if group else np.empty(0, np.int64),
        times_s,
        np.array([each.label_time_s for each in examples], np.float64) - times_s,
        devices=Words.of(each.device for each in examples),
        fields={
            name: Words.of(f"{each.fields.get(name, '')}" for each in examples) for name in slices
        },
        sessions=Words.of(f"{each.fields.get(told, '')}" for each in examples if told),
    )


async def _offer(
    home: Home, family: Family, candidate: Candidate, judgement: Judgement
) -> tuple[str, int]:
    """Hand the release to the home's campaign; its publisher signs to disk, nobody listens yet.

    Returns its name and counter. A call that was killed may have come this far: then the release
    that it has offered is the one.
    """
    clock, lineage = SystemClock(), Lineage(home.lineage)
    part = lineage.of(family.name)
    releases = Releases(family.name, Registry(home.registry), part)
    bus = await MemoryBroker().connect(name="backfill")
    known = {name: passed_before(lineage.of(name)) for name in home.families()}
    signers = release_signers(home, lambda name, sha256: known.get(name, {}).get(sha256))
    publish = releases.publishing(Publisher(home.root, bus, signers, clock))
    campaign = home.of(family.name).campaign
    controller = Controller(campaign_rules(family), campaign, publish, part, clock)
    await controller.start()
    offered = _offered(controller, part, judgement.sha256)
    if offered is None:
        offer = releases.register(candidate, judgement)
        await controller.offer(offer)
        offered = offer.release, offer.counter
    await controller.close()
    await bus.close()
    return offered


def _offered(controller: Controller, lineage: Lineage, sha256: str) -> tuple[str, int] | None:
    """Name and counter of the release of this package that the campaign has already."""
    status = controller.status()
    arms = (status["stable"], status["canary"])
    live = {status["pending"], *(arm["release"] for arm in arms if arm)}
    return next(
        (
            (entry["release"], entry["counter"])
            for entry in lineage.read("release")
            if entry["sha256"] == sha256 and entry["release"] in live
        ),
        None,
    )


def _refused(judgement: Judgement) -> RefusedError:
    return RefusedError(
        "gate_refused",
        f"the first release under the new features did not pass: {judgement.why_not}",
        "the release that serves is unchanged; its features.toml serves on",
    )
