"""A contest: terms, shares, effects and what is said of them; on worlds whose truth is known."""

from __future__ import annotations

import msgspec
import pytest

from cloud_learner.rollout.contest import EXPOSURE_MIN, Contest, Terms, check, rounded
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.errors import RequestError
from edge_runtime.wire.messages import Scored

AB = Terms(kind="ab", releases=("r1", "r2"), answers=4000)
BANDIT = Terms(kind="bandit", releases=("r1", "r2"), floor=0.1, every_s=600.0)
BINARY = Task()


def begun(terms=AB, outcome="reward", now_s=0.0) -> Contest:
    return Contest.begin(terms, "ads", outcome, BINARY, now_s)


def answer(seq, release, label, propensity=0.5, outputs=(0.5, 0.5)):
    scored = [
        Scored(name, "", [output]) for name, output in zip(("r1", "r2"), outputs, strict=True)
    ]
    scored.sort(key=lambda each: each.release != release)
    time_s = float(seq)
    return Example(
        *("d", 1, seq, "ads", time_s, time_s, b"", "", label, propensity, scored, time_s, time_s)
    )


def answers(count, r1, r2, start=1):
    """The two answer by turns; `r1` and `r2` of each 10 answers of theirs are rewarded."""
    return [
        answer(seq, "r1", float(seq // 2 % 10 < r1))
        if seq % 2
        else answer(seq, "r2", float(seq // 2 % 10 < r2))
        for seq in range(start, start + count)
    ]


def test_a_difference_is_told_in_points_with_an_interval_that_holds_it():
    contest = begun()
    contest.examples(answers(4000, 1, 3))
    low, high = contest.interval
    assert 0.1 < low < 0.2 < high < 0.3
    assert contest.winner == "r2"
    assert contest.verdict == (
        f"r2 earns {100 * low:.2f} to {100 * high:.2f} points more than r1; 2,000 and 2,000 "
        "answers; sure at 99 %"
    )


def test_a_release_that_is_worse_is_told_as_such():
    contest = begun()
    contest.examples(answers(4000, 3, 1))
    assert contest.winner == "r1"
    assert "r2 earns" in contest.verdict
    assert "points less than r1" in contest.verdict


def test_no_difference_is_told_by_how_large_one_could_still_be():
    contest = begun()
    contest.examples(answers(4000, 2, 2))
    assert contest.winner is None
    most = 100 * max(abs(bound) for bound in contest.interval)
    assert contest.verdict == (
        f"no difference of r2 to r1 larger than {most:.2f} points is left, nor can one be seen "
        "yet; 2,000 and 2,000 answers; sure at 99 %"
    )


def test_nothing_is_said_before_each_release_has_answered_often_enough():
    contest = begun()
    contest.examples(answers(2 * EXPOSURE_MIN - 2, 0, 10))
    assert contest.winner is None
    assert (
        contest.verdict == f"too early to say of r2 and r1: 499 and 499 answers of {EXPOSURE_MIN}"
    )
    contest.examples(answers(2, 0, 10, start=2 * EXPOSURE_MIN - 1))
    assert contest.winner == "r2"


def test_quality_counts_every_request_for_both():
    contest = begun(outcome="quality")
    contest.examples([answer(seq, "r1", 1.0, outputs=(0.6, 0.8)) for seq in range(1, 2001)])
    contest.examples([answer(seq, "r2", 0.0, outputs=(0.3, 0.1)) for seq in range(2001, 4001)])
    assert contest.effect.mean == pytest.approx(((0.16 - 0.04) + (0.09 - 0.01)) / 2)
    assert "r2 answers" in contest.verdict
    assert "points better than r1" in contest.verdict


def test_it_ends_by_its_answers_whatever_the_grouping():
    examples = answers(6000, 1, 3)
    one, many = begun(), begun()
    one.examples(examples)
    for each in examples:
        many.examples([each])
    assert one.is_over
    assert one.ledger.answered == AB.answers
    assert one == many
    assert not one.examples(examples)


def test_a_contest_that_was_stored_goes_on_to_the_same_shares():
    whole, stored = begun(BANDIT), begun(BANDIT)
    for number in range(1, 6):
        fresh = [
            answer(seq, f"r{1 + seq % 2}", float(seq % 4 < 2), whole.shares[seq % 2])
            for seq in range(number * 200, number * 200 + 200)
        ]
        for contest in (whole, stored):
            contest.examples(fresh)
            contest.draw([150, 50], number * 600.0)
        stored = msgspec.json.decode(msgspec.json.encode(stored), type=Contest)
    assert stored == whole
    assert len(whole.ledger.plans) == 6


def test_shares_of_a_bandit_follow_the_rewards_and_keep_the_floor():
    contest = begun(BANDIT)
    assert contest.shares == [0.5, 0.5]
    assert not contest.is_due(599.0)
    assert contest.is_due(600.0)
    contest.examples(answers(2000, 2, 4))
    contest.draw([0, 0], 600.0)
    assert contest.shares == [0.1, 0.9]
    assert not contest.is_due(1199.0)
    assert contest.winner == "r2"
    assert contest.verdict == "shares now: r2 90%, r1 10%; 2,000 answers"
    assert not contest.is_over


def test_answers_under_way_make_shares_follow_the_means_and_change_no_mean():
    few, many = begun(BANDIT), begun(BANDIT)
    for contest in (few, many):
        contest.examples(answers(40, 2, 4))
    few.draw([0, 0], 600.0)
    many.draw([100_000, 100_000], 600.0)
    assert few.shares[1] < many.shares[1] == 0.9


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"releases": ("r1",)}, "bad_contest"),
        ({"releases": ("r1", "r1")}, "bad_contest"),
        ({"releases": ("r1", "r2", "r3")}, "bad_contest"),
        ({"answers": 10}, "bad_contest"),
        ({"alpha": 0.0}, "bad_contest"),
        ({"kind": "bandit", "floor": 0.6}, "bad_contest"),
        ({"kind": "bandit", "floor": 0.0}, "bad_contest"),
        ({"kind": "bandit", "floor": float("nan")}, "bad_contest"),
        ({"kind": "bandit", "every_s": 0.0}, "bad_contest"),
        ({"kind": "bandit", "every_s": float("nan")}, "bad_contest"),
        ({"releases": ("r2", "r3")}, "stable_not_in_contest"),
    ],
)
def test_terms_that_cannot_be_held_are_refused_by_name(change, code):
    with pytest.raises(RequestError) as caught:
        check(msgspec.structs.replace(AB, **change), "r1")
    assert caught.value.code == code
    check(AB, "r1")
    check(msgspec.structs.replace(BANDIT, releases=("r1", "r2", "r3")), "r2")


def test_shares_are_rounded_to_a_sum_of_one():
    assert rounded([1 / 3, 1 / 3, 1 / 3]) == [0.3334, 0.3333, 0.3333]
    assert rounded([0.05, 0.912345, 0.037655]) == [0.05, 0.9123, 0.0377]
