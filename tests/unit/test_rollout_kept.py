"""A campaign on disk: the version before is read, journals are cut where the state says."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from cloud_learner.rollout.campaign import Campaign
from cloud_learner.rollout.kept import JOURNALS_MAX, Kept
from cloud_learner.rollout.state import Rules
from edge_runtime.errors import CapacityError

FIRST_FORMAT = Path(__file__).parents[1] / "fixtures" / "campaign-v1.json"
RULES = Rules(family="flight_delay", selector={"airport": "EWR"}, stages=(5.0, 100.0))


def test_a_campaign_of_the_first_format_goes_on_with_its_trial_in_the_first_stage(tmp_path):
    shutil.copy(FIRST_FORMAT, tmp_path / "campaign.json")

    saved = Kept(tmp_path / "campaign.json").load(RULES, 500.0)

    state, trial = saved.state, saved.state.trial
    assert (state.seq, state.stable.release, state.pending.release) == (4, "r1", "r4")
    assert (trial.offer.release, trial.at, trial.began_s, trial.evidence.pairs) == (
        "r3",
        0,
        500.0,
        0,
    )
    assert state.counts.rolled_back == len(state.quarantined) == len(state.decisions) == 1
    assert [sample.freshness_s for sample in saved.freshness] == [51.0]


def test_a_trial_of_the_first_format_ends_as_every_other(tmp_path):
    shutil.copy(FIRST_FORMAT, tmp_path / "campaign.json")
    kept = Kept(tmp_path / "campaign.json")
    campaign = Campaign(RULES, kept.load(RULES, 500.0).state)

    campaign.tick(500.0 + RULES.stage_s)

    plans = [step.plan for step in campaign.state.outbox]
    assert [(plan.seq, plan.reason) for plan in plans] == [(5, "undecided"), (6, "canary")]
    assert plans[1].canary.release == "r4"
    kept.save(msgspec.json.encode(campaign.state), campaign.fed)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["00000006-r4.jsonl"]


def save(kept, *lines):
    """Save some state, with these lines of one journal."""
    kept.save(b"{}", [("00000002-r2.jsonl", line) for line in lines])


def test_what_a_crash_left_in_a_journal_beyond_the_state_is_cut_off(tmp_path):
    kept = Kept(tmp_path / "campaign.json")
    save(kept, b"one", b"two")
    journal = tmp_path / "trials" / "00000002-r2.jsonl"
    with journal.open("ab") as file:
        file.write(b"three\nfo")

    save(kept, b"four")

    assert journal.read_bytes() == b"one\ntwo\nfour\n"


def test_a_save_that_failed_is_done_again_without_doubling_a_line(tmp_path):
    kept = Kept(tmp_path / "campaign.json")
    save(kept, b"one")
    (tmp_path / "campaign.json").unlink()
    (tmp_path / "campaign.json").mkdir()  # a rename onto it fails
    with pytest.raises(CapacityError) as caught:
        save(kept, b"two")
    assert caught.value.code == "disk_failed"
    (tmp_path / "campaign.json").rmdir()

    save(kept, b"two")

    assert (tmp_path / "trials" / "00000002-r2.jsonl").read_bytes() == b"one\ntwo\n"


def test_the_newest_journals_are_kept_with_what_was_signed(tmp_path):
    kept = Kept(tmp_path / "campaign.json")
    for seq in range(JOURNALS_MAX + 5):
        name = f"{seq:08d}-r{seq}.jsonl"
        kept.save(b"{}", [(name, b"line")])
        kept.keep_signed(name, b"plan")

    names = sorted(path.name for path in (tmp_path / "trials").iterdir())

    assert len(names) == 2 * JOURNALS_MAX
    assert names[0] == "00000005-r5.jsonl"
