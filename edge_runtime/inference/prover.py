"""The prover: tries a package in a child process before the process that serves loads it.

Why: a model is a program. ONNX Runtime refuses most bad ones by an exception, but some end the
process (a division that the CPU traps), never end (a loop of 2**62 turns) or take all memory. In
a child that costs a refusal; where requests are answered it would cost all of them.

The child loads and warms what it is given, and checks golden samples, through the very code that
serves. It is started when there is something to prove, stays for the next package, and is ended
after a short idleness, by its deadline, or with the thread that started it. It has little
priority, a bound on memory by the size of the file, and is the first that the kernel ends when the
machine has none left.

Invariants: one child at a time; `prove` returns only for a package that was loaded whole; whatever
a model does to the child, the caller gets a PackageError, and an error of another kind where the
child could not even start, which says nothing about the package.

Knows nothing about shelves, plans and hashes: prove only a file whose hash was checked, or a disk
that flips bits would speak against a genuine release.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from edge_runtime.errors import CapacityError, HeadwaterError, PackageError
from edge_runtime.inference import trial
from edge_runtime.inference.slot import load_bare_arm

IDLE_S = 10.0
BYTES_PER_S = 8 << 20
"""How slowly a large file may be loaded, warmed and tried before it counts as hanging."""

MEMORY_BYTES, MEMORY_PER_BYTE = 1 << 30, 8
"""A proof may take so much for what a run computes, and so many times the file for its weights:
read, unpacked and packed again, and all that twice while numbers of threads are compared."""

_START_S = 30.0
_NICENESS = 10
_LINE_BYTES_MAX = 1 << 16
_MESSAGE_CHARACTERS_MAX = 2000
_OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


class Prover:
    """Proves one package after the other; any thread may call, and waits for its turn.

    A proof may take `timeout_s`, and a second for each `BYTES_PER_S` of the file; a child without
    work is ended after `idle_s`.
    """

    def __init__(self, timeout_s: float = 30.0, *, idle_s: float = IDLE_S) -> None:
        self._timeout_s, self._idle_s = timeout_s, idle_s
        self._turn, self._closed = threading.Lock(), threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._idle: threading.Timer | None = None
        self._counts = {"proofs": 0, "refused": 0, "starts": 0}

    def prove(self, path: Path) -> None:
        """Return when the package or bare ONNX file at `path` loads, runs and is what it says.

        Raises: PackageError (package_crashed, package_hung, package_too_big, or what loading
        raises), CapacityError `no_prover`.
        """
        with self._turn:
            self._counts["proofs"] += 1
            self._stop_idling()
            if self._child is not None and self._child.poll() is not None:
                self._end()  # the thread that started it is gone, and it went with it
            try:
                self._ask(self._child or self._start(), path)
            except PackageError:
                self._counts["refused"] += 1
                raise
            finally:
                self._idle = _timer(self._idle_s, self._rest)

    def close(self) -> None:
        """Give up the proof that is going on, if any, with `no_prover`; there will be no other."""
        self._closed.set()
        child = self._child
        if child is not None:
            child.kill()
        self._rest()

    def statistics(self) -> dict[str, int]:
        """Proofs asked for and refused, children started, and whether one is there now."""
        return self._counts | {"children": int(self._child is not None)}

    def _start(self) -> subprocess.Popen[bytes]:
        """A child that has imported everything. Raises: CapacityError."""
        command = [sys.executable, "-P", "-m", "edge_runtime.inference.prover"]
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        try:
            self._child = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        except OSError as error:
            raise _no_prover(str(error)) from error
        self._counts["starts"] += 1
        line, _ = self._read(self._child, _START_S)
        if line != b"null\n" or self._closed.is_set():
            status = self._end()
            raise _no_prover(f"a child that should try it ended with status {status}")
        return self._child

    def _ask(self, child: subprocess.Popen[bytes], path: Path) -> None:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            child.stdin.write(json.dumps(str(path.absolute())).encode() + b"\n")
        timeout_s = self._timeout_s + _size(path) / BYTES_PER_S
        line, expired = self._read(child, timeout_s)
        try:
            refusal = json.loads(line)
        except ValueError:
            status = self._end()
            raise _hung(path, timeout_s) if expired else _death(path, status) from None
        if refusal is not None:
            raise PackageError(*refusal)

    def _read(self, child: subprocess.Popen[bytes], timeout_s: float) -> tuple[bytes, bool]:
        """The child's next line, and whether the deadline came first, which ends the child."""
        assert child.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            child.kill()

        deadline = _timer(timeout_s, expire)
        line = child.stdout.readline(_LINE_BYTES_MAX)
        deadline.cancel()
        return line, expired.is_set()

    def _end(self) -> int:
        """End the child and reap it; returns what it ended with, by itself if it had already."""
        child, self._child = self._child, None
        if child is None:
            return 0
        with child:
            child.kill()
        return child.returncode

    def _rest(self) -> None:
        with self._turn:
            self._stop_idling()
            self._end()

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None


def _timer(after_s: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(after_s, call)
    timer.name, timer.daemon = "prover", True
    timer.start()
    return timer


def _hung(path: Path, timeout_s: float) -> PackageError:
    return PackageError(
        "package_hung",
        f"{path} did not load and run within {timeout_s:.1f} s; it was not loaded",
        "does it loop, or is it too much for this machine?",
    )


def _death(path: Path, status: int) -> HeadwaterError:
    if status == -signal.SIGKILL:  # no deed of the model's own
        return _no_prover("the child was ended from outside, perhaps for lack of memory")
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return PackageError(
        "package_crashed", f"{path} ended the process that tried it ({how}); it was not loaded"
    )


def _no_prover(why: str) -> CapacityError:
    return CapacityError(
        "no_prover",
        f"a package could not be tried before loading it, what runs is unchanged: {why}",
        "free memory or processes; it is tried again with the next check for updates",
    )


def _too_big(path: str, why: str) -> PackageError:
    return PackageError(
        "package_too_big",
        f"{path} takes more memory than a package of its size may: {why}; it was not loaded",
        "a smaller model, or one that computes with smaller tensors",
    )


def main() -> None:
    """The child: for each path on stdin one line of JSON on stdout, null for a sound package."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    _be_humble()
    _say(answers, None)
    for line in sys.stdin:
        _say(answers, _tried(json.loads(line)))


def _tried(path: str) -> PackageError | None:
    try:
        _try(path)
    except PackageError as error:
        return error
    except MemoryError:
        return _too_big(path, "it asked for more than the bound")
    return None


def _say(answers: int, error: PackageError | None) -> None:
    refusal = None
    if error is not None:
        refusal = [error.code, error.message[:_MESSAGE_CHARACTERS_MAX], error.hint]
    os.write(answers, json.dumps(refusal).encode() + b"\n")


def _be_humble() -> None:
    """Die with the parent, not of signals to its group; leave no core; let it have what is scarce.

    A child that a service manager or Ctrl-C ended would speak against the package that it tried.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(_PR_SET_DUMPABLE, 0)  # also where cores go to a collector, which no limit stops
    os.nice(_NICENESS)


def _try(path: str) -> None:
    """Load the file as the process that serves would. Raises: PackageError, MemoryError."""
    _bound_memory(path)
    try:
        runner = load_bare_arm(path, "proof").runner
    except PackageError as error:
        _check_memory(path, error)
        raise
    if runner.run_us is None:  # no made-up row would run, which alone is no fault
        try:
            runner.infer(trial.sample(runner.inputs, 1))
        except PackageError as error:
            _check_memory(path, error)


def _check_memory(path: str, error: PackageError) -> None:
    if any(words in error.message for words in _OUT_OF_MEMORY):
        raise _too_big(path, error.message) from error


def _bound_memory(path: str) -> None:
    """Let this process grow by so much from here; what it holds already is not counted."""
    with open("/proc/self/statm", encoding="ascii") as file:
        data_pages = int(file.read().split()[5])
    growth = MEMORY_BYTES + MEMORY_PER_BYTE * _size(path)
    limit = data_pages * resource.getpagesize() + growth
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _size(path: Path | str) -> int:
    """A file's size; what cannot be read is refused by name later."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


if __name__ == "__main__":
    main()
