"""From real sessions to a package that adapts within a session, and on to the package after it."""

from __future__ import annotations

import hashlib
import io
import math
from itertools import groupby

import numpy as np
import pytest
import torch

from cloud_learner.bootstrap import bootstrap
from cloud_learner.config import Home
from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.offline import is_held_out, load_set
from cloud_learner.package.delta import patch_between
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.registry import Registry
from cloud_learner.train.family import Family
from edge_runtime.inference.slot import load_arm
from edge_runtime.personal.head import Head
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.patch import applied

VISITS = 150
LATER_S = 1e6
JUMP = 0.15
"""Log odds by which a session's shift may move from one candidate to the next; measured: 0.08."""


@pytest.fixture(scope="module")
def made(taste, tmp_path_factory):
    """The family's folder, a home that a bootstrap made of real visits, and its judgement."""
    var = tmp_path_factory.mktemp("taste")
    folder = taste.write_family(var / "taste")
    data = taste.write_csv(var / "data.csv", taste.visits(VISITS))
    home = Home(var / "home")
    return folder, home, bootstrap(folder, data, home, lambda _text: None)


@pytest.fixture
def restored(made):
    """`restored()` is the cycle as the bootstrap left it."""
    folder, home, _ = made

    def restored() -> Cycle:
        own = home.of("taste")
        cycle = Cycle(Family.load(folder), load_set(own.reference).features)
        cycle.restore(own.checkpoint)
        cycle.take_graph(own.graph)
        return cycle

    return restored


@pytest.fixture
def load(tmp_path):
    """`load(package)` is an arm of the package's bytes."""

    def load(package: bytes):
        path = tmp_path / f"{hashlib.sha256(package).hexdigest()}.onnx"
        path.write_bytes(package)
        return load_arm(path, None, "stable", "r1", 1.0)

    return load


@pytest.fixture(scope="module")
def batches(taste, made):
    """Micro-batches of visits that the bootstrap did not know."""
    spec, examples = Family.load(made[0]).spec, []
    for seq, event in enumerate(taste.visits(120, seed=2, start_s=LATER_S), start=1):
        time_s, kind, device, fields, label, label_time_s = event
        features = np.array([fields[name] for name in spec.names], "<f4").tobytes()
        about = spec.hash, label, 1.0, [], 0.0, 0.0, kind, fields
        examples.append(Example(device, 1, seq, "taste", time_s, label_time_s, features, *about))
    return [Batch(n + 1, examples[60 * n : 60 * n + 60]) for n in range(len(examples) // 60)]


def visits_of(taste, count, seed):
    """Rows and labels of each of so many visits."""
    events = sorted(taste.visits(count, seed=seed), key=lambda event: event[3]["visit"])
    for _, visit in groupby(events, key=lambda event: event[3]["visit"]):
        told = list(visit)
        rows = np.array([[each[3][name] for name in "abc"] for each in told], np.float32)
        yield rows, [each[4] for each in told]


def rebased(head, arm):
    moved = head.carried(arm.info.policy.prior)
    moved.catch_up(embedded(arm))
    return moved


def embedded(arm):
    """What a head's replay asks of an arm."""

    def embed(rows):
        embeddings, answers = arm.runner.embed(np.ascontiguousarray(rows, np.float32))
        return embeddings, answers[:, 0]

    return embed


def test_the_first_release_knows_past_sessions_and_passed_the_gate(made, load):
    _, home, judgement = made
    arm = load(Registry(home.registry).path(judgement.sha256).read_bytes())

    assert judgement.outcome == "pass"
    assert arm.info.policy.prior.width == arm.runner.width == 8
    assert (arm.info.policy.prior.task, arm.info.policy.prior.region) == ("binary", 4.0)


def test_both_forms_carry_one_policy(restored, load):
    candidate = restored().candidate()
    arms = [load(package) for package in (candidate.package, candidate.float_package)]

    assert len({arm.info.policy.to_json() for arm in arms}) == 1


def test_the_prior_helps_strangers_on_a_device(made, taste):
    """From the fifth label on; measured: 5 % less log loss."""
    _, home, judgement = made
    lost = {"base": 0.0, "adapted": 0.0}
    with Runtime.open(package=Registry(home.registry).path(judgement.sha256)) as runtime:
        for number, (time_s, kind, _, fields, label, _) in enumerate(
            taste.visits(120, seed=9, start_s=LATER_S)
        ):
            session = runtime.session("taste", fields["visit"])
            answer = session.predict(Event(kind, time_s, fields))
            assert answer.adapted or answer.outputs == answer.base, number
            if session.explain().labels >= 4:
                lost["base"] += loss(answer.base[0], label)
                lost["adapted"] += loss(answer.outputs[0], label)
            session.label(answer.id, label)

    assert lost["adapted"] < 0.97 * lost["base"]


def loss(chance: float, label: float) -> float:
    return -math.log(chance if label else 1 - chance)


def test_a_restored_cycle_makes_the_very_package_that_was_released(made, restored):
    assert made[2].sha256 == hashlib.sha256(restored().candidate().package).hexdigest()


def test_a_checkpoint_from_before_sessions_makes_packages_whose_sessions_sleep(
    restored, batches, load, tmp_path
):
    restored().save(tmp_path / "new.pt")
    state = torch.load(tmp_path / "new.pt", weights_only=False)
    del state["personal"]
    torch.save(state, tmp_path / "old.pt")
    cycle = restored()
    fresh = Cycle(cycle.family, cycle._reference)
    fresh.restore(tmp_path / "old.pt")
    assert load(fresh.candidate().package).info.policy is None

    fresh.learn(batches[0])
    assert load(fresh.candidate().package).info.policy is not None


def test_a_graph_from_before_sessions_is_exported_anew(taste, restored, load, tmp_path):
    region = '[personal]\nregion = 4.0\ngroup = "visit"\nmemory = 60\n'
    before = Family.load(taste.write_family(tmp_path / "f", {"family.toml": (region, "")}))
    cycle = restored()
    old = Cycle(before, cycle._reference)
    old.keep_graph(tmp_path / "graph.onnx")
    assert load(old.candidate().package).runner.width == 0

    cycle.take_graph(tmp_path / "graph.onnx")
    assert load(cycle.candidate().package).runner.width == 8


def test_candidates_change_nothing_that_is_learned_later(restored, batches):
    asked, never = restored(), restored()
    for batch in batches[:10]:
        asked.learn(batch)
        asked.candidate()
        never.learn(batch)

    assert asked.candidate() == never.fork().candidate() == never.candidate()


def test_held_out_rows_and_those_of_quarantined_devices_are_no_sessions(restored, batches):
    cycle, learned = restored(), 0
    before = cycle.personal.state()["past"]
    for batch in batches[:4]:
        cycle.learn(batch)
        learned += sum(not is_held_out(each) for each in batch.examples)
    past = {key: times for key, times, *_ in cycle.personal.state()["past"]}
    known = {(device, time) for (device, _), times in past.items() for time in times}
    held = {(e.device, e.time_s) for b in batches[:4] for e in b.examples if is_held_out(e)}

    assert held
    assert not held & known
    new = {key: times for key, times in past.items() if key not in {each[0] for each in before}}
    assert sum(map(len, new.values())) == learned

    cycle.teaching.trust.quarantined["a"] = None
    cycle._remember(*entered_and_lesson(cycle, batches[5]))
    after = {key: times for key, times, *_ in cycle.personal.state()["past"]}
    newest = max(each.time_s for each in batches[3].examples)
    assert not [times for key, times in after.items() if key[0] == "a" and times[-1] > newest]
    assert [times for key, times in after.items() if key[0] == "b" and times[-1] > newest]


def entered_and_lesson(cycle, batch):
    entered = cycle.ledger.enter(batch.examples)
    return entered, cycle._lesson(entered)


def test_a_session_moves_to_the_next_candidate_without_a_jump(restored, batches, taste, load):
    cycle, strangers = restored(), np.random.default_rng(3).normal(size=(50, 3))
    arm, told = load(cycle.candidate().package), list(visits_of(taste, 12, seed=4))
    heads = [taught(arm, *visit) for visit in told]
    worst = 0.0
    for batch in batches[:10]:
        cycle.learn(batch)
        following = load(cycle.candidate().package)
        moved = [rebased(head, following) for head in heads]
        for (rows, _), before, after in zip(told, heads, moved, strict=True):
            for seen in (rows, strangers):
                jump = shifts(after, following, seen) - shifts(before, arm, seen)
                worst = max(worst, float(np.abs(jump).max()))
        arm, heads = following, moved

    assert 0 < worst < JUMP


def test_a_session_that_stays_on_its_release_is_the_same_bit_for_bit(restored, taste, load):
    arm = load(restored().candidate().package)
    for visit in visits_of(taste, 5, seed=4):
        head = taught(arm, *visit)
        again = rebased(head, arm)

        assert np.array_equal(again.mean, head.mean)
        assert np.array_equal(again.covariance, head.covariance)


def taught(arm, rows, labels) -> Head:
    head = Head(arm.info.policy.prior, rows.shape[1])
    embeddings, bases = embedded(arm)(rows)
    for embedding, base, label, row in zip(embeddings, bases, labels, rows, strict=True):
        head.adapt(embedding, float(base), label, row)
    return head


def shifts(head: Head, arm, rows):
    return np.array([head.shift(each) for each in embedded(arm)(rows)[0]])


def test_a_patch_brings_the_next_prior_too(restored, batches):
    cycle = restored()
    base = cycle.candidate().package
    cycle.learn(batches[0])
    package = cycle.candidate().package
    patch = patch_between(base, package)

    assert patch is not None
    assert b"".join(applied(io.BytesIO(base), patch, len(package))) == package
