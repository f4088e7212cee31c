"""tools/bench-learner: its enemies and shifts do what it says; data that is absent is told."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud_learner.experiment.asked import Asked

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(TOOLS))


def asked(rows):
    times_s = 1000.0 + 1800.0 * np.arange(rows)
    features = np.arange(rows, dtype=np.float32)[:, None]
    labels = (np.arange(rows) % 3 == 0).astype(np.float32)
    known_s = times_s + 60.0
    return Asked(["one"] * rows, times_s, known_s, features, labels, [], 1000.0, known_s[-1])


def test_the_hostile_flip_what_they_stream_and_send_it_ten_times_and_nobody_else_does(tool):
    trust = tool("bench_learner_trust")
    clean = trust._spread(asked(2000))
    poisoned = trust._poisoned(clean)
    rows = poisoned.features[:, 0].astype(int)
    streamed = clean.times_s >= trust.stream_start_s(clean)
    attacks = np.isin(clean.devices, trust.HOSTILE) & streamed
    hostile = attacks[rows]

    assert 0 < streamed.sum() < len(streamed)
    assert len(set(clean.devices)) == trust.DEVICES
    assert (poisoned.labels[hostile] == 1 - clean.labels[rows[hostile]]).all()
    assert (poisoned.labels[~hostile] == clean.labels[rows[~hostile]]).all()
    counts = np.bincount(rows)
    assert set(counts[attacks]) == {trust.FLOOD}
    assert set(counts[~attacks]) == {1}
    assert (np.diff(poisoned.times_s) >= 0).all()


def test_labels_are_turned_twice_and_turned_back(tool):
    shift = tool("bench_learner_shift")
    before = asked(1000)
    turned = shift._turned(before).labels != before.labels

    edges = np.flatnonzero(np.diff(turned.astype(int))) + 1
    assert edges.tolist() == [round(1000 * share) for share in shift.TURNS]


def test_a_declaration_is_changed_where_a_dotted_key_says(tool):
    streams = tool("bench_learner_streams")
    family = streams.Family.load(TOOLS.parent / "models/electricity")
    other = streams.changed(family, {"label.policy": "arrival", "learning.fast.passes": 7})

    assert (other.config.label.policy, other.config.learning.fast.passes) == ("arrival", 7)
    assert family.config.label.policy == "mature"


def test_a_part_whose_data_is_not_here_is_skipped_and_says_so(tmp_path):
    command = [sys.executable, TOOLS / "bench-learner", "--quick", "--json", "--only", "elec2"]
    env = {**os.environ, "HEADWATER_DATA": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)

    assert json.loads(done.stdout)["rows"] == []
    assert "elec2 is skipped" in done.stderr
    assert str(tmp_path) in done.stderr
