"""Jobs in processes: all of them, in order, or a clear end."""

from __future__ import annotations

import importlib
import signal
import sys

import pytest

from cloud_learner.experiment.pool import run_all, workers_for
from edge_runtime.errors import CapacityError, ConfigError

JOBS = """
import os
import signal
from edge_runtime.errors import ConfigError

def run(shared, job, tick):
    tick()
    if job == "listens":
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return signal.SIGINT in blocked, signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if job == "dies":
        os._exit(9)
    if job == "fails":
        raise ConfigError("bad_job", "it fails")
    return shared + job, os.getpid()
"""


@pytest.fixture(scope="module", name="run")
def fixture_run(tmp_path_factory):
    """A job that other processes can import."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs_of_a_test.py").write_text(JOBS)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("jobs_of_a_test").run
    sys.path.remove(str(folder))


def test_results_come_in_the_order_of_the_jobs_from_more_than_one_process(run):
    found = run_all(run, 100, list(range(6)), 6, 2)

    assert [result for result, _ in found] == [100, 101, 102, 103, 104, 105]
    assert all(process != 0 for _, process in found)


def test_an_interrupt_is_the_parents_from_a_process_begin_on(run):
    assert run_all(run, "", ["listens", "listens"], 2, 2) == [(True, True)] * 2
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_one_worker_is_this_process(run, capsys):
    found = run_all(run, "job ", ["a", "b"], 2, 1)

    assert [result for result, _ in found] == ["job a", "job b"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("100 % done, about 0 s left")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_job_comes_out_as_it_is(run, workers):
    with pytest.raises(ConfigError) as caught:
        run_all(run, "", ["a", "fails", "b"], 3, workers)

    assert (caught.value.code, caught.value.message) == ("bad_job", "it fails")


def test_a_process_that_dies_ends_the_experiment_with_a_word(run):
    with pytest.raises(CapacityError) as caught:
        run_all(run, "", ["a", "dies", "b"], 3, 2)

    assert caught.value.code == "worker_died"


def test_there_are_no_more_workers_than_jobs():
    assert workers_for(1) == 1
    assert workers_for(0) == 1
    assert workers_for(1000) >= 1
