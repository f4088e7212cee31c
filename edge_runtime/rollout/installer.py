"""The installer: brings plans to the shelf and into memory, and remembers those that serve.

Why: what may block, network, disk and model loading, has a thread of its own; the agent decides on
the event loop when.

Invariants: a sync object, for the thread `update` alone. What is in memory stays there; what serves
and is not is loaded again from the shelf, for the signed metadata may not list it any more. A plan
is remembered for a restart before the floor rises to it. What an update may go back to is on the
shelf before it is needed.

Knows nothing about when a plan is obeyed, nor about what serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.arms import Loaded, load_plan, load_plan_arm, packages_kept
from edge_runtime.rollout.placement import Here
from edge_runtime.rollout.plan import Plan, PlanArm, Variant
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import Freshness


class Updates(Protocol):
    """What the agent asks of an update client, on the thread `update`."""

    @property
    def freshness(self) -> Freshness: ...

    def refresh(self) -> None: ...

    def plan(self, family: str, /) -> Plan: ...

    def fetch(self, arm: PlanArm, package: Variant, shelf: Shelf, /) -> Path: ...

    def check_course(
        self, plan: Plan, seen: Plan, shall: Sequence[PlanArm], has: Sequence[PlanArm], /
    ) -> None: ...

    def lowest_counter(self, family: str, /) -> int: ...

    def confirm(self, plan: Plan, /) -> None: ...


class Installer:
    """Installs on `shelf` what `client` proves; `prove` may refuse a package before its load."""

    def __init__(
        self, client: Updates, shelf: Shelf, here: Here, prove: Callable[[Path], None] | None
    ) -> None:
        self._client, self._shelf, self._here, self._prove = client, shelf, here, prove

    def newest(self, family: str) -> tuple[Plan, int]:
        """The family's newest plan, and the signed floor of its releases. Raises: as `Updates`."""
        return self._client.plan(family), self._client.lowest_counter(family)

    def load(
        self, plan: Plan, runs: Plan | None, fetch: bool, resident: Sequence[Arm] = ()
    ) -> Loaded:
        """`plan` in memory, in the place of `runs`; without `fetch`, of what is on the shelf.

        Raises: as `load_plan_arm` of the stable release.
        """
        known = {arm.sha256 for arm in self._here.arms(runs)} if runs else set()

        def load(name: str, arm: PlanArm) -> Arm:
            obtain = partial(self._obtain, arm, arm.sha256 in known) if fetch else None
            return load_plan_arm(self._shelf, name, arm, obtain, self._prove, resident=resident)

        return load_plan(plan, self._here, load, runs)

    def settle(self, plan: Plan, current: Mapping[str, Plan | None]) -> None:
        """Remember and confirm `plan`; keep the packages that run, of each family's `current` plan,
        those that a restart would serve, and those to go back to.

        Raises: CapacityError, and what fetching the fallback raises.
        """
        self._shelf.save_current(plan, self._client.lowest_counter(plan.family))
        self._client.confirm(plan)
        stored = [self._shelf.load_current(family) for family in current]
        previous = [self._shelf.load_previous(family) for family in current]
        arms = [arm for each in (*current.values(), *stored) if each for arm in each.named]
        arms += [each.stable for each in previous if each is not None]
        self._shelf.prune(set().union(*(packages_kept(self._shelf, arm) for arm in arms)))
        if plan.fallback is not None:
            self._bring(plan.fallback)

    def _obtain(self, arm: PlanArm, runs: bool, package: Variant) -> Path:
        path = self._shelf.path_of(package.sha256) if runs else None
        return path or self._client.fetch(arm, package, self._shelf)

    def _bring(self, arm: PlanArm) -> None:
        """A fallback: when it is needed, there may be no network, and no time."""
        kept = packages_kept(self._shelf, arm) - self._shelf.quarantined().keys()
        for package in arm.packages:
            if package.sha256 in kept:
                self._client.fetch(arm, package, self._shelf)
