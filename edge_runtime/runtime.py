"""The runtime: what an application calls, in its own process or through the daemon's socket.

Why: one object answers, remembers and takes labels, with all that may block kept elsewhere.

Threads: every method may be called from any thread. Predictions, observations and labels take turns
(a turn is microseconds); `infer` runs side by side. What ends in `_async` belongs to an event loop,
any one, and never stalls it: a model too heavy to run inline runs on a thread of its own. What runs
inline takes the caller's thread as it is: `cpus.flush_denormals` may be called there.

Invariants: a prediction id, `device.epoch.seq`, is handed out once, ever. What was refused left no
trace in windows or log. After a restart the windows are, bit for bit, what the log's durable
records say they are.

Knows nothing about sockets, brokers or signatures.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Self

from edge_runtime import config as configuration
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.config import EdgeConfig
from edge_runtime.device import restart, standing
from edge_runtime.device.adapting import Adapting
from edge_runtime.device.asking import Asking
from edge_runtime.device.family import Family
from edge_runtime.device.ranking import Ranking
from edge_runtime.device.releases import Releases
from edge_runtime.device.serving import ModelInfo, Serving
from edge_runtime.device.sketching import Sketcher
from edge_runtime.device.watch import Watch
from edge_runtime.device.words import Event, Prediction
from edge_runtime.errors import HeadwaterError, RequestError
from edge_runtime.events.journal import Journal
from edge_runtime.events.labels import position
from edge_runtime.events.log import random_step
from edge_runtime.inference.slot import Arm
from edge_runtime.metrics import Histogram
from edge_runtime.rollout.plan import Plan
from edge_runtime.session import Session
from edge_runtime.tensorial import Tensorial
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire.messages import Report

__all__ = ["Event", "ModelInfo", "Prediction", "Runtime"]


class Runtime(Tensorial):
    """A device's families, answering; made by `open`, ended by `close` or as a context manager."""

    def __init__(self, config: EdgeConfig, clock: Clock, step: Callable[[], int]) -> None:
        self.config, self.device, self.families = config, config.device, config.families
        self._clock = clock
        self._members = {name: Family(name, self.device, clock) for name in self.families}
        self.journal = Journal(config, lambda: standing.states(self._members), clock, step)
        self.log, self.epoch = self.journal.log, self.journal.log.epoch
        try:
            self.shelf = Shelf(config.state_dir / "shelf")  # guarded by the log's lock, too
        except BaseException:
            self.log.close()
            raise
        slots = {name: family.pipeline.slot for name, family in self._members.items()}
        self._refusals, self._counting = {"request_errors": 0, "requests_dropped": 0}, Lock()
        self._serving = Serving(slots, config.inference, self._refused)
        self._asking = Asking(self._members, self.journal, self._serving, clock, self._refused)
        kept = config.state_dir / "sessions"
        self.adapting = Adapting(self._members, self._asking, clock, config.sessions, kept)
        self.ranking = Ranking(self._asking, self.adapting, self._serving, self._refused)
        self._releases = Releases(self._members, self.journal, self.shelf, self._asking.turn)
        self.sketcher = Sketcher(self.log, self._members, clock)
        self.watch = Watch(self._members, self._releases, self._serving.worker)
        self._ends, self._closed, self._told = contextlib.ExitStack(), False, 0

    @classmethod
    def open(
        cls,
        source: str | Path | EdgeConfig | None = None,
        *,
        package: str | Path | None = None,
        clock: Clock | None = None,
        step: Callable[[], int] = random_step,
    ) -> Self:
        """The runtime that a configuration describes, serving what its shelf says ran last.

        With `package`, any ONNX file is served instead: no broker, no keys, no learner, and a state
        that ends with the runtime. Its family is what its metadata says, or else the file's name.
        The epoch lies `step()` above the last.

        Raises: ConfigError for the configuration, the package, or a state directory that another
        process owns.
        """
        with contextlib.ExitStack() as ends:
            if package is not None:
                assert source is None, "a configuration or a package, not both"
                source = ends.enter_context(restart.temporary_config(Path(package)))
            assert source is not None, "a configuration or a package"
            config = source if isinstance(source, EdgeConfig) else configuration.load(Path(source))
            runtime = cls(config, clock or SystemClock(), step)
            ends.callback(runtime.log.close)  # a start that fails leaves snapshots as they were
            restart.bring_back(runtime._members, runtime.shelf, config, runtime.journal)
            runtime.adapting.restore()
            runtime._ends = ends.pop_all()
        return runtime

    def predict(self, family: str, event: Event) -> Prediction:
        """Answer an event, and log the answer with the feature values behind it.
        Raises: RequestError (unknown_family, no_release, no_features, unknown_kind, not_predicted,
        unknown_field, missing_field, wrong_type, not_finite, out_of_range, event_from_future,
        too_large), PackageError (run_failed).
        """
        return self._asking.predict(family, event)

    async def predict_async(
        self, family: str, event: Event, *, timeout_s: float | None = None
    ) -> Prediction:
        """As `predict`, without stalling the event loop however heavy the model is.

        `timeout_s` None: the configured deadline. The windows are read when it is called, and moved
        when the answer is logged.
        Raises: as `predict`, and CapacityError (overloaded, deadline_exceeded), nothing logged.
        """
        return await self._asking.predict_async(family, event, timeout_s)

    def predict_many(
        self, family: str, events: Sequence[Event]
    ) -> list[Prediction | HeadwaterError]:
        """The answers to `events`, in order, with one run of the model; errors in their places.

        Each is what `predict` would have given, to rounding. Raises: RequestError (unknown_family).
        """
        return self._asking.predict_many(family, events)

    def observe(self, family: str, event: Event) -> int:
        """Let the windows see an event; returns its number in the log. Raises: as `predict`."""
        return self._asking.observe(family, event)

    def session(self, family: str, key: str) -> Session:
        """What is said within the session of `key`, a text that names whom it is of; it never
        leaves the device. Raises: RequestError (unknown_family, bad_session_key).
        """
        return Session(
            self._asking.family(family).name, key, self._asking, self.adapting, self.ranking
        )

    def forget_sessions(self, family: str | None = None) -> int:
        """Forget all sessions, of `family` or of all, at once; how many there were.
        Raises: RequestError `unknown_family`.
        """
        return self.adapting.forget(family)

    def label(
        self,
        prediction_id: str,
        value: float,
        *,
        time_s: float | None = None,
        final: bool = True,
        family: str | None = None,
    ) -> int:
        """Say what turned out to be true of a prediction, at `time_s` (None: now).

        `family` may be left out where the device has only one. Returns the label's own sequence
        number in the log, class label. Windows over labels see the first final one.
        Raises: RequestError (unknown_prediction, prediction_lost, wrong_type, not_finite,
        bad_label, unknown_family).
        """
        return self._asking.label(family, prediction_id, value, time_s, final=final)

    async def durable(self, prediction_id: str) -> None:
        """Return once a prediction would survive a power cut; what lingers is written now.
        Raises: RequestError (unknown_prediction, prediction_lost), CapacityError (record_dropped
        by a disk that took nothing for long, log_closed).
        """
        epoch, seq = position(self.log, prediction_id)
        if epoch == self.epoch:
            await self.log.wait_durable("event", seq)

    def ready(self, family: str | None = None) -> bool:
        """Whether `family`, or every family, has a release that is loaded, proven and warm."""
        names = self.families if family is None else [family]
        members = [self._members.get(name) for name in names]
        return all(each is not None and each.pipeline.slot.arms for each in members)

    def swap(self, family: str, arms: Sequence[Arm], plan: Plan | None) -> None:
        """Serve `arms`, loaded and proven, as `plan` says; no request is dropped. New windows come
        from the log first, which may take long: in an event loop use `adopt`. Raises: PackageError,
        TrustError, CapacityError, with what serves unchanged.
        """
        self._releases.swap(self._asking.family(family), arms, plan)

    async def adopt(self, family: str, arms: Sequence[Arm], plan: Plan | None) -> None:
        """As `swap`, with the log read on another thread while the old release answers on."""
        await self._releases.adopt(self._asking.family(family), arms, plan)

    def rollback(self, family: str, reason: str) -> str:
        """Leave the newest release, or the canary, for what served before it, and quarantine it;
        returns what serves now. Raises: RequestError (unknown_family, nothing_to_roll_back),
        PackageError and CapacityError with what serves unchanged.
        """
        return self._releases.roll_back(self._asking.family(family), reason)

    async def rollback_async(self, family: str, reason: str) -> str:
        """As `rollback`, with the package loaded on another thread."""
        return await self._releases.roll_back_async(self._asking.family(family), reason)

    def current(self, family: str) -> Plan | None:
        """The plan that `family` follows; None before its first release."""
        return self._asking.family(family).plan

    def resident(self, family: str) -> Sequence[Arm]:
        """The arms of `family` that are in memory, those that answer first."""
        return self._asking.family(family).pipeline.slot.resident

    def survived(self) -> list[tuple[int, str, int]]:
        """(epoch, class, last sequence number) of what restarts left of earlier epochs."""
        return self.journal.survived()

    def latencies(self) -> dict[str, Histogram]:
        """What was measured of each call, by its name, in microseconds."""
        asked = {"predict": self._asking.latency, "infer": self._serving.latency}
        return asked | {"rank": self.ranking.latency}

    def report(self, refused: dict[str, int]) -> Report:
        """What this device says about itself; `refused` counts refused updates by error code."""
        self._told += 1
        self.adapting.expire()
        return standing.report(self, self._members.values(), self._clock, refused, self._told)

    def counters(self) -> dict[str, int]:
        """Counts since the process started, over all families."""
        asked = self._asking.counts | {"infers": self._serving.infers} | self._refusals
        return standing.counters(asked, self._members.values())

    def statistics(self) -> dict[str, Any]:
        """Everything that is counted here, as texts, numbers, lists and maps."""
        told = standing.told(self, self._members) | self.journal.statistics()
        worker = self._serving.worker.statistics()
        beside = {"shelf": self.shelf.statistics(), "sessions": self.adapting.statistics()}
        return told | beside | {"worker": worker}

    def close(self) -> None:
        """Make everything durable and stop, once, whatever fails meanwhile.
        Raises: CapacityError `log_not_durable`.
        """
        if self._closed:
            return
        self._closed = True
        with self._ends, contextlib.ExitStack() as last_first:
            last_first.callback(self._close_log)
            last_first.callback(self._serving.close)  # no turn: a ranking there may wait for one
            last_first.callback(self.adapting.close)
            last_first.callback(self._asking.shadowing.close)
            last_first.callback(self.watch.close)

    def _close_log(self) -> None:
        with self._asking.turn:
            try:
                self.journal.close()
            finally:
                for family in self._members.values():
                    family.pipeline.swap(())
                    family.pipeline.slot.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await asyncio.to_thread(self.close)

    def _refused(self, error: HeadwaterError) -> None:
        kind = "request_errors" if isinstance(error, RequestError) else "requests_dropped"
        with self._counting:
            self._refusals[kind] += 1
