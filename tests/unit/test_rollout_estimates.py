"""Off-policy estimates over an archive: which requests count, and that they hold the truth."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cloud_learner.console.estimates import table as drawn
from cloud_learner.estimating import shares_of
from cloud_learner.rollout.estimates import estimated, read, table
from cloud_learner.simulate.customers import Customers
from cloud_learner.stats.tasks import Task
from cloud_learner.store.archive import Archive
from edge_runtime.errors import RequestError
from edge_runtime.rollout.plan import Plan, PlanArm
from edge_runtime.wire.messages import Scored

TRUTH = {"r1": 0.1, "r2": 0.2, "r3": 0.4}
BINARY = Task()


def plan(*shares) -> Plan:
    arms = [
        PlanArm(name, f"m/ads/{name}.onnx", "ab" * 32, number, share)
        for number, (name, share) in enumerate(zip(TRUTH, shares, strict=False))
    ]
    return Plan(
        family="ads", seq=1, stable=arms[0], canary=arms[1], others=tuple(arms[2:]), salt="s"
    )


def answered(count, *shares):
    customers = Customers("ads", 5, lambda release, _now_s: TRUTH[release], delay_s=60.0)
    customers.follow(plan(*shares))
    customers.ask(count, 100.0)
    return customers.matured(1000.0)


@pytest.fixture
def archive(tmp_path):
    made = Archive(tmp_path / "examples")
    yield made
    made.close()


def test_intervals_of_releases_and_of_shares_that_never_were_hold_the_truth(archive):
    archive.write(answered(6000, 0.6, 0.3, 0.1), 1)
    logged = read(archive, "ads", [], "reward", BINARY)
    shares = {"r2": 1.0, "r3": 3.0}
    found = table(logged, shares)
    assert [each.name for each in found] == ["r1", "r2", "r3", "shares"]
    truths = [*TRUTH.values(), 0.25 * 0.2 + 0.75 * 0.4]
    for each, truth in zip(found, truths, strict=True):
        assert each.rows == 6000
        for estimate in (each.ips, each.snips, each.dr):
            assert estimate.low < truth < estimate.high, each
    assert found[-1].shares == {"r1": 0.0, "r2": 0.25, "r3": 0.75}
    assert found[2].dr.high - found[2].dr.low < found[2].ips.high - found[2].ips.low


def test_requests_that_another_release_answered_still_count(archive):
    archive.write(answered(6000, 0.6, 0.3, 0.1), 1)
    logged = read(archive, "ads", ["r2", "r1"], "reward", BINARY)
    found = estimated(logged, "r2", {"r2": 1.0})
    assert (logged.arms < 0).mean() == pytest.approx(0.1, abs=0.02)
    assert found.rows == 6000
    assert found.ips.low < TRUTH["r2"] < found.ips.high


def test_quality_is_known_of_each_release_at_each_request(archive):
    scored = [Scored("r1", "", [0.9]), Scored("r2", "", [0.4])]
    examples = [
        msgspec.structs.replace(each, label=1.0, propensity=0.5, scored=scored)
        for each in answered(50, 0.5, 0.5)
    ]
    archive.write(examples, 1)
    for found, quality in zip(
        table(read(archive, "ads", [], "quality", BINARY), {}), (0.99, 0.64), strict=True
    ):
        assert found.dr.value == pytest.approx(quality, abs=1e-6)
        assert found.dr.high - found.dr.low == pytest.approx(0.0, abs=1e-6)


def test_what_came_early_amended_or_drawn_by_nobody_counts_once_or_not(archive):
    first, second, third, *_ = answered(10, 0.5, 0.5)
    archive.write(
        [
            msgspec.structs.replace(first, early=True, weight=3.0),
            first,
            msgspec.structs.replace(first, label=1.0 - first.label, revision=1),
            msgspec.structs.replace(second, propensity=1.0),
            msgspec.structs.replace(third, scored=third.scored[:1]),
        ],
        1,
    )
    logged = read(archive, "ads", [], "reward", BINARY)
    np.testing.assert_array_equal(logged.rewards, [1.0 - first.label])


def test_what_was_never_logged_is_told_by_name(archive):
    with pytest.raises(RequestError, match="nothing_logged"):
        read(archive, "ads", [], "reward", BINARY)
    archive.write(answered(10, 0.5, 0.5), 1)
    with pytest.raises(RequestError, match="unknown_release"):
        read(archive, "ads", ["r1", "r3"], "reward", BINARY)


def test_the_table_says_what_is_known_and_what_is_not():
    known = {"value": 0.123, "low": 0.1, "high": 0.15, "effective_rows": 10.0}
    unknown = {"value": None, "low": None, "high": None, "effective_rows": 0.0}
    row = {"name": "r1", "rows": 1200, "ips": known, "snips": unknown, "dr": known}
    line = drawn([row]).splitlines()[1]
    assert [part.strip() for part in line.split("  ") if part] == [
        *("r1", "1,200", "12.30 [10.00, 15.00]", "nothing known", "12.30 [10.00, 15.00]")
    ]


def test_shares_are_read_from_a_command_or_refused_by_name():
    assert shares_of("") == {}
    assert shares_of("r1=0.3, r2=0.7") == {"r1": 0.3, "r2": 0.7}
    for text in ("r1", "r1=x", "r1=-1", "r1=nan", "r1=0,r2=0", "r1=1=2"):
        with pytest.raises(RequestError, match="bad_shares"):
            shares_of(text)
