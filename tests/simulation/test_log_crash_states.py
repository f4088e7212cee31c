"""Whatever a power cut leaves of a log, it opens by itself and holds what it called durable."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from edge_runtime.files import OsFiles

TOOL = Path(__file__).parents[2] / "tools" / "crash_states.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("crash_states", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("states", [600, pytest.param(12_000, marks=pytest.mark.slow)])
def test_no_crash_state_breaks_a_promise(tool, states):
    count, found = tool.explore(states)

    assert count >= states
    assert not found, "\n".join(found[:20])


def test_a_history_drops_learns_and_reopens(tool):
    """Guards the guard: a history in which little happens would break no promise."""
    _, known = zip(*(tool.play(seed) for seed in range(1, 7)), strict=True)
    last = [history[-1] for history in known]

    assert sum(len(each.epochs) for each in last) > 10
    assert sum(sum(each.gone.values()) for each in last) > 100
    assert sum(sum(each.durable.values()) for each in last) > 1000


def test_a_log_that_does_not_sync_is_found_out(tool):
    files, known = tool.play(1)
    unsynced = [each for each in files.operations if each[0] != "sync"]
    state = tool.crash(unsynced, tool.random.Random(1), 0.0)

    with pytest.raises(Exception, match="log_unusable"):
        list(tool.violations(state, known[-1], known[-1]))


def test_a_log_that_forgets_a_record_is_found_out(tool):
    files, known = tool.play(1)
    state = tool.crash(files.operations, tool.random.Random(1), 1.0)
    victim = max(path for path in state if path.suffix == ".segment")
    del state[victim]

    assert list(tool.violations(state, known[-1], known[-1]))


def test_the_disk_in_memory_is_a_disk(tool):
    assert {name for name in dir(OsFiles) if not name.startswith("_")} <= set(
        dir(tool.MemoryFiles())
    )
