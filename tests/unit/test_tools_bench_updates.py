"""tools/bench-updates: its parts run against a real broker and a real device."""

from __future__ import annotations

import pytest


def test_a_large_download_outlives_the_broker_and_trust_is_weighed(measured) -> None:
    rows = measured("bench-updates", "resume", "memory")
    assert rows["hash right after the broker's death"] == 1
    assert 0 < rows["the model's share that was there when the broker died"] < 1
    assert rows["the model's share that was fetched again"] < 0.5
    assert 0 < rows["added by trust to the daemon's RSS"] < 100


@pytest.mark.slow
def test_releases_go_the_whole_path_from_their_own_labels(measured) -> None:
    rows = measured("bench-updates", "path")
    assert rows["releases that went the whole path"] >= 3
    whole = "the whole path: a micro-batch's last mature label to its release serving on the canary"
    assert 0 < rows["of it, from the gate's verdict on, p50"] < rows[f"{whole}, p50"]
