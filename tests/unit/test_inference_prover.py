"""Proving in a child: what a model does to the process that loads it becomes an error, not a death.

The bad models are real ones, a few nodes each, that ONNX Runtime loads without complaint.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import CapacityError, HeadwaterError, PackageError
from edge_runtime.inference.prover import MEMORY_BYTES, Prover
from edge_runtime.inference.slot import load_arm

WAIT_S = 30
WriteModel = Callable[[str], Path]

# The most negative number has no counterpart, so x86 traps this division; `x` keeps it from being
# worked out, and caught, while the graph is optimised.
DIVIDES = """ <int32[1] lowest = {-2147483648}, int32[1] none = {0}, int32[1] minus_one = {-1}> {
    x = Cast <to = 6> (features)
    zero = Mul (x, none)
    low = Add (zero, lowest)
    high = Div (low, minus_one)
    probability = Cast <to = 1> (high) }"""
LOOPS = """ <int64 turns = {4611686018427387904}, bool yes = {1}> {
    probability = Loop <body = b (int64 i, bool on, float[n,5] x) => (bool still, float[n,5] y) {
        still = Identity (on)
        y = Identity (x) }> (turns, yes, features) }"""
# What it asks for grows from turn to turn, so no single request is beyond all measure.
DOUBLES = """ <int64 turns = {34}, bool yes = {1}> {
    much = Loop <body = b (int64 i, bool on, float[n,5] x) => (bool still, float[m,5] y) {
        still = Identity (on)
        y = Concat <axis = 0> (x, x) }> (turns, yes, features)
    probability = ReduceSum <keepdims = 0> (much) }"""
FILLS = """ <int64[1] count = {25000000000}> {
    much = ConstantOfShape (count)
    probability = ReduceSum <keepdims = 0> (much) }"""
ADDS = "<float[1] one = {1}> { probability = Add (features, one) }"


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    def write(body: str) -> Path:
        from onnx import parser

        text = '<ir_version: 8, opset_import: ["": 17]> g (float[n,5] features) => (probability)'
        model = parser.parse_model(text + body)
        model.graph.output[0].type.tensor_type.elem_type = 1
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


@pytest.fixture
def prover() -> Iterator[Prover]:
    prover = Prover()
    yield prover
    prover.close()


def refused(prover: Prover, path: Path) -> HeadwaterError:
    with pytest.raises(HeadwaterError) as caught:
        prover.prove(path)
    return caught.value


def pid_of(prover: Prover) -> int:
    assert prover._child is not None
    return prover._child.pid


def ticks_of(pid: int) -> int:
    """Processor time that a process has used, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def await_end(pid: int) -> None:
    """Wait until a process has ended, reaped or not."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        ended, _, _ = select.select([descriptor], [], [], WAIT_S)
        os.close(descriptor)
        assert ended


def test_packages_and_bare_files_are_proven_by_one_child(prover, write_package, write_model):
    prover.prove(write_package()[0])
    prover.prove(write_model(ADDS))
    prover.prove(write_package(bias=1.0)[0])
    assert prover.statistics() == {"proofs": 3, "refused": 0, "starts": 1, "children": 1}


@pytest.mark.parametrize(
    "fault", [{"model_bias": 0.1}, {"drop": "headwater.golden"}, {"columns": 6}]
)
def test_what_loading_refuses_is_refused_in_the_same_words(prover, write_package, fault):
    path, _ = write_package(**fault)
    with pytest.raises(PackageError) as caught:
        load_arm(path, None, "stable", "r1", 1.0)
    error = refused(prover, path)
    assert type(error) is PackageError
    assert (error.code, error.message, error.hint) == (
        *(caught.value.code, caught.value.message, caught.value.hint),
    )
    assert prover.statistics() == {"proofs": 1, "refused": 1, "starts": 1, "children": 1}


@pytest.mark.parametrize("data", [None, b"", b"no model at all"])
def test_a_file_that_is_no_model_is_unreadable(prover, tmp_path, data):
    path = tmp_path / "in another\nplace é\udcff.onnx"
    if data is not None:
        path.write_bytes(data)
    error = refused(prover, path)
    assert error.code == "unreadable_package"
    assert str(path) in error.message


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs do not trap this division")
def test_a_model_that_ends_its_process_is_refused_and_the_next_one_proven(
    prover, write_package, write_model
):
    error = refused(prover, write_model(DIVIDES))
    assert (type(error), error.code) == (PackageError, "package_crashed")
    assert "SIGFPE" in error.message
    prover.prove(write_package()[0])
    assert prover.statistics() == {"proofs": 2, "refused": 1, "starts": 2, "children": 1}


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_any_signal_that_a_model_provokes_is_named(prover, write_package, write_model, number):
    prover.prove(write_package()[0])
    with proving(prover, write_model(LOOPS)) as errors:
        os.kill(pid_of(prover), number)
    [error] = errors
    assert (type(error), error.code) == (PackageError, "package_crashed")
    assert number.name in error.message


def test_a_model_that_never_ends_is_refused_at_the_deadline(write_package, write_model):
    prover = Prover(timeout_s=0.5)
    path = write_model(LOOPS)
    error = refused(prover, path)
    assert (type(error), error.code) == (PackageError, "package_hung")
    assert str(path) in error.message
    prover.prove(write_package()[0])
    assert prover.statistics()["starts"] == 2
    prover.close()


@pytest.mark.parametrize("body", [FILLS, DOUBLES])
def test_a_model_that_takes_too_much_memory_is_refused_before_it_has_it(
    prover, write_package, write_model, body
):
    prover.prove(write_package()[0])
    before = peak_bytes(pid_of(prover))
    error = refused(prover, write_model(body))
    assert (type(error), error.code) == (PackageError, "package_too_big")
    assert peak_bytes(pid_of(prover)) - before < 1.1 * MEMORY_BYTES
    prover.prove(write_package()[0])
    assert prover.statistics()["starts"] == 1


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_a_child_ended_from_outside_speaks_against_no_package(prover, write_package, write_model):
    prover.prove(write_package()[0])
    idle_ticks = ticks_of(pid_of(prover))
    with proving(prover, write_model(LOOPS)) as errors:
        while ticks_of(pid_of(prover)) < idle_ticks + 5:  # until it is at work on the model
            os.sched_yield()
        os.kill(pid_of(prover), signal.SIGKILL)
    assert [(type(error), error.code) for error in errors] == [(CapacityError, "no_prover")]
    prover.prove(write_package()[0])
    assert prover.statistics() == {"proofs": 3, "refused": 0, "starts": 2, "children": 1}


def test_signals_to_the_whole_group_do_not_end_a_proof(prover, write_package):
    prover.prove(write_package()[0])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid_of(prover), number)
    prover.prove(write_package()[0])
    assert prover.statistics()["starts"] == 1


def test_a_child_that_cannot_be_started_speaks_against_no_package(prover, write_package):
    path, _ = write_package()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        error = refused(prover, path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (type(error), error.code) == (CapacityError, "no_prover")
    prover.prove(path)


def test_closing_gives_up_the_proof_that_goes_on(prover, write_package, write_model):
    prover.prove(write_package()[0])
    with proving(prover, write_model(LOOPS)) as errors:
        prover.close()
    assert [error.code for error in errors] == ["no_prover"]
    assert prover.statistics()["children"] == 0
    assert refused(prover, write_package()[0]).code == "no_prover"


def test_an_idle_child_ends_and_the_next_proof_starts_another(write_package):
    prover = Prover(idle_s=0.05)
    prover.prove(write_package()[0])
    prover._idle.join(WAIT_S)
    assert prover.statistics() == {"proofs": 1, "refused": 0, "starts": 1, "children": 0}
    prover.prove(write_package()[0])
    assert prover.statistics()["starts"] == 2
    prover.close()


def test_a_child_goes_with_the_thread_that_started_it_and_is_replaced(prover, write_package):
    path, _ = write_package()
    thread = threading.Thread(target=prover.prove, args=(path,))
    thread.start()
    thread.join(WAIT_S)
    await_end(pid_of(prover))
    prover.prove(path)
    assert prover.statistics() == {"proofs": 2, "refused": 0, "starts": 2, "children": 1}


def test_a_child_in_the_middle_of_a_proof_dies_with_its_parent(write_package, write_model):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from edge_runtime.inference.prover import Prover\n"
        "prover = Prover()\n"
        "prover.prove(Path(sys.argv[1]))\n"
        "print(prover._child.pid, flush=True)\n"
        "prover.prove(Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(write_package()[0]), str(write_model(LOOPS))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    await_end(pid)


def test_proofs_of_many_threads_take_turns(prover, write_package):
    sound, broken = write_package()[0], write_package(model_bias=0.5)[0]
    verdicts: list[tuple[Path, str]] = []

    def prove(path: Path) -> None:
        try:
            prover.prove(path)
            verdicts.append((path, "ok"))
        except PackageError as error:
            verdicts.append((path, error.code))

    prover.prove(sound)  # the child belongs to this thread, not to one that ends first
    threads = [threading.Thread(target=prove, args=(each,)) for each in [sound, broken] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(verdicts) == sorted([(sound, "ok"), (broken, "golden_mismatch")] * 4)
    assert prover.statistics()["starts"] == 1


def test_the_child_stands_back_and_closing_leaves_nothing_open(write_package):
    descriptors = len(os.listdir("/proc/self/fd"))
    prover = Prover()
    prover.prove(write_package()[0])
    pid = pid_of(prover)
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, ours + 10)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    prover.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@contextlib.contextmanager
def proving(prover: Prover, path: Path) -> Iterator[list[HeadwaterError]]:
    """A proof on a thread of its own while the block runs; what it raised, once that is over."""
    errors: list[HeadwaterError] = []

    def prove() -> None:
        try:
            prover.prove(path)
        except HeadwaterError as error:
            errors.append(error)

    thread = threading.Thread(target=prove)
    thread.start()
    while not prover._turn.locked():
        pass
    yield errors
    thread.join(WAIT_S)
    assert not thread.is_alive()
