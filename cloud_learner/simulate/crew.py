"""A crew: many whole devices in one process, each with a state, a trust and a connection.

Why: hundreds of devices as hundreds of processes do not fit on one machine; what an update of a
fleet costs shows only with hundreds.

Invariants: each device is the product's own runtime and cloud side; what one process shares is the
interpreter and the child that proves packages. The crew says by itself whenever a device serves
something else, with the time of the machine's monotonic clock, which all processes have in common.
When its input ends, also because who started it died, every device ends in order.

Knows nothing about what is published. Orders go in as lines of JSON, and what happens comes out
as lines of JSON: `python -m cloud_learner.simulate.crew ROOT PACE_S EVENT`.
"""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_runtime import config as configuration
from edge_runtime.device.words import Event
from edge_runtime.errors import HeadwaterError
from edge_runtime.inference.prover import Prover
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.plan import Plan
from edge_runtime.runtime import Runtime
from edge_runtime.update.patch import PatchEntry
from edge_runtime.uplinked import cloud_side

What = Literal["start", "stop", "count"]


class Order(msgspec.Struct, frozen=True):
    """What a crew shall do: start or stop the device that lives in `home`, or count all answers."""

    what: What
    home: str = ""


class Fact(msgspec.Struct, frozen=True):
    """What happened to `device` at `at_s`, monotonic.

    `serves`: the releases `serving`, the stable one first, follow plan `seq`. `counts` answers an
    order: requests by the release that answered, when each answered last, and requests without one.
    `failed`: it, or all of its process, is gone, and `note` says why.
    """

    what: Literal["serves", "stopped", "failed", "counts"]
    device: str
    at_s: float
    seq: int = 0
    serving: list[str] = []
    answered: dict[str, int] = {}
    last_s: dict[str, float] = {}
    failed: int = 0
    note: str = ""


class Crew:
    """A process of devices that trust the root in the file `root`; `told` hears every fact.

    Each device is asked `event` every `pace_s`; what the process complains of goes to `log`.
    """

    def __init__(
        self, root: Path, event: Event, pace_s: float, log: Path, told: Callable[[Fact], None]
    ) -> None:
        said = [str(root), f"{pace_s}", msgspec.json.encode(event).decode()]
        self._command = [sys.executable, "-m", "cloud_learner.simulate.crew", *said]
        self._log, self._told = log, told
        self._child: Process | None = None
        self._may_end = False
        self._ears: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin, without a device."""
        with open(self._log, "ab") as log:  # noqa: ASYNC230 - a local file
            self._child = await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, stderr=log
            )
        self._may_end = False
        self._ears = asyncio.create_task(self._hear(self._child))

    def order(self, what: What, home: Path | str = "") -> None:
        """Tell the crew what to do."""
        assert self._running.stdin is not None
        self._running.stdin.write(msgspec.json.encode(Order(what, str(home))) + b"\n")

    async def kill(self) -> None:
        """All its devices are gone when this returns, as after a power cut."""
        self._may_end = True
        self._running.kill()
        await self._wait()

    async def close(self) -> None:
        """All its devices end in order."""
        self._may_end = True
        if self._child is not None and self._child.returncode is None:
            assert self._child.stdin is not None
            self._child.stdin.close()
            await self._wait()

    def rss_mb(self) -> float:
        """The memory of the process."""
        status = Path(f"/proc/{self._running.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    @property
    def _running(self) -> Process:
        assert self._child is not None, "the crew was not started"
        return self._child

    async def _wait(self) -> None:
        await self._running.wait()
        assert self._ears is not None
        await self._ears

    async def _hear(self, child: Process) -> None:
        assert child.stdout is not None
        while line := await child.stdout.readline():
            if line.endswith(b"\n"):  # half a line is all that a kill left
                self._told(msgspec.json.decode(line, type=Fact))
        if not self._may_end:
            note = f"the process ended with {await child.wait()}; {self._log} may say why"
            self._told(Fact("failed", "a whole crew", time.monotonic(), note=note))


class _Device(Runtime):
    """A runtime that says what it serves, and remembers who answered."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.answered: Counter[str] = Counter()
        self.last_s: dict[str, float] = {}
        self.failed = 0
        self.on_tell: Callable[[], None] = _nothing

    async def adopt(self, family: str, arms: Sequence[Arm], plan: Plan | None) -> None:
        await super().adopt(family, arms, plan)
        self.tell(family)

    def tell(self, family: str) -> None:
        """Say what serves now."""
        plan = self.current(family)
        if plan is not None:
            serving = [arm.release for arm in self.report({}).arms if arm.family == family]
            _say(Fact("serves", self.device, time.monotonic(), plan.seq, serving))
            self.on_tell()

    def ask(self, event: Event) -> None:
        """One request, as an application makes it; before the first release none is made."""
        if not self.ready():
            return
        try:
            release = self.predict(self.families[0], event).release
        except HeadwaterError:
            self.failed += 1
        else:
            self.answered[release] += 1
            self.last_s[release] = time.monotonic()

    def count(self) -> None:
        """Say who answered so far."""
        now_s, told = time.monotonic(), {"answered": self.answered, "last_s": self.last_s}
        _say(Fact("counts", self.device, now_s, failed=self.failed, **told))  # type: ignore[arg-type] # each of its own type


class _Inside:
    """All devices of this process.

    The first comes up alone: msgspec learns a type at its first use, and two threads that have it
    learn the same one at once end the process.
    """

    def __init__(self, root: bytes, pace_s: float, event: Event) -> None:
        self._root, self._pace_s, self._event = root, pace_s, event
        self._prover = Prover()
        self._aboard: dict[str, _Device] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._first, self._warm = True, asyncio.Event()

    async def run(self) -> None:
        """Follow orders until there are no more."""
        orders, loop = asyncio.StreamReader(), asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        async with asyncio.TaskGroup() as group:
            while line := await orders.readline():
                order = msgspec.json.decode(line, type=Order)
                if order.what == "start":
                    end = self._ends[order.home] = asyncio.Event()
                    group.create_task(self._live(order.home, end))
                elif order.what == "stop":
                    self._ends[order.home].set()
                else:
                    for device in self._aboard.values():
                        device.count()
            for end in self._ends.values():
                end.set()
        self._prover.close()

    async def _live(self, home: str, end: asyncio.Event) -> None:
        """One device from its start to its end; what fails is told, and the others go on."""
        config = configuration.load(Path(home) / "edge.toml")
        is_first, self._first = self._first, False
        if not is_first:
            await self._warm.wait()
        try:
            with await asyncio.to_thread(_Device.open, config) as device:
                async with cloud_side(device, self._root, {}, self._prover) as works:
                    self._aboard[home] = device
                    device.on_tell = self._warm.set
                    device.tell(config.families[0])
                    device.watch.wake()
                    await _until(end, *works, self._ask(device))
                    device.count()
            _say(Fact("stopped", config.device, time.monotonic()))
        except HeadwaterError as error:
            _say(Fact("failed", config.device, time.monotonic(), note=str(error)))
        finally:
            self._warm.set()
            self._aboard.pop(home, None)

    async def _ask(self, device: _Device) -> None:
        """Requests at a steady pace, each device's a little apart from the next one's."""
        await asyncio.sleep(self._pace_s * (hash(device.device) % 100) / 100)
        while True:
            device.ask(msgspec.structs.replace(self._event, time_s=time.time()))
            await asyncio.sleep(self._pace_s)


async def _until(end: asyncio.Event, *works: Any) -> None:
    """Run `works` side by side until `end`; should one of them fail, end all of them with it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
        await end.wait()
        for task in tasks:
            task.cancel()


def _nothing() -> None:
    """Nobody listens yet."""


def _say(fact: Fact) -> None:
    """One line, whole."""
    sys.stdout.write(msgspec.json.encode(fact).decode() + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until stdin ends."""
    import uvloop

    faulthandler.enable()
    msgspec.json.Decoder(PatchEntry)  # used by nobody before the second release
    root, pace_s, event = sys.argv[1:]
    inside = _Inside(Path(root).read_bytes(), float(pace_s), msgspec.json.decode(event, type=Event))
    uvloop.run(inside.run())


if __name__ == "__main__":
    main()
