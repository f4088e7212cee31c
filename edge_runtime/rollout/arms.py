"""The arms of a plan brought into memory: which packages, and what becomes of those that fail.

Why: an update and a restart must load a release in the same way, and come to the same package: a
restart that chose anew would answer a little differently than before.

Invariants: a package that fails here is quarantined by its hash, and the others may serve; what was
chosen once is loaded again, alone, for as long as it is good. Before a package is blamed its file
is hashed anew: a disk, or a process out of file handles, is not its fault. An arm whose packages
all fail leaves everything as it was, with the first one's error; where it is a trial, the others go
on without it.

Knows nothing about signatures and slots that serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from edge_runtime.errors import HeadwaterError, PackageError, TrustError
from edge_runtime.inference.slot import Arm, load_arm
from edge_runtime.inference.variants import fastest
from edge_runtime.rollout.placement import Here, with_trials
from edge_runtime.rollout.plan import Plan, PlanArm, Variant, arms_for
from edge_runtime.update.shelf import Shelf

Obtain = Callable[[Variant], Path]
Prove = Callable[[Path], None]
Load = Callable[[str, PlanArm], Arm]


@dataclass(frozen=True)
class Loaded:
    """A plan in memory: its arms here, and why it has fewer trials than was asked for."""

    plan: Plan
    arms: list[Arm]
    failures: list[HeadwaterError] = field(default_factory=list)


def load_plan(plan: Plan, here: Here, load: Load, runs: Plan | None) -> Loaded:
    """What `here` runs of `plan`, by `load`; without arms where that is `runs`, which it has.

    A trial that does not load, or does not go with the stable release, is left out of the plan.
    Raises: what `load` raises of the stable release.
    """
    (name, stable), *trials = arms_for(plan, here.device, here.attributes)
    found, failures = list[tuple[PlanArm, Arm]](), list[HeadwaterError]()
    for each, arm in trials:
        try:
            found.append((arm, load(each, arm)))
        except HeadwaterError as error:
            failures.append(error)
    if failures and with_trials(plan, [arm for arm, _ in found]) == runs:
        return Loaded(runs, [], failures)
    first = load(name, stable)
    fitting = [each for each in found if _fits(each[1], first)]
    failures += [_unfit(each[1], first) for each in found if each not in fitting]
    if failures:
        plan = with_trials(plan, [arm for arm, _ in fitting])
    names = [name for name, _ in arms_for(plan, here.device, here.attributes)]
    arms = [first, *(arm for _, arm in fitting)]
    named = [replace(arm, name=name) for name, arm in zip(names, arms, strict=True)]
    return Loaded(plan, named, failures)


def load_plan_arm(
    shelf: Shelf,
    name: str,
    arm: PlanArm,
    obtain: Obtain | None = None,
    prove: Prove | None = None,
    *,
    resident: Sequence[Arm] = (),
) -> Arm:
    """The arm of a plan in memory, of the package that is fastest of those that are right here.

    `obtain` gives a package's path (None: what lies on the shelf); `prove` may refuse what lies
    there before it is loaded into this process. What is `resident` already, and on the shelf for a
    restart, is not loaded again.

    Raises: PackageError as `load_arm` (not_on_shelf), TrustError (release_quarantined),
    CapacityError (shelf_unwritable), and what `obtain` and `prove` raise.
    """
    good = good_packages(shelf, arm)
    chosen = [each for each in good if each.sha256 == shelf.chosen(arm.sha256)]
    if (here := _resident(shelf, arm, chosen or good, resident)) is not None:
        return replace(here, name=name, weight=arm.weight, shadow=arm.mode == "shadow")

    def load(package: Variant) -> Arm:
        path = (obtain or partial(_from_shelf, shelf))(package)
        with _quarantining(shelf, package):
            if prove is not None:
                prove(path)
            loaded = load_arm(
                path, package.sha256, name, arm.release, arm.weight, variant=package.name
            )
            return replace(loaded, shadow=arm.mode == "shadow")

    loaded = fastest(partial(load, each) for each in chosen or good)
    if arm.variants and not chosen:
        shelf.choose(arm.sha256, loaded.sha256)
    return loaded


def _resident(
    shelf: Shelf, arm: PlanArm, may: Sequence[Variant], resident: Sequence[Arm]
) -> Arm | None:
    """What runs already of the packages that an arm may be, unless there is a choice to make."""
    hashes = {each.sha256 for each in may}
    for each in resident:
        is_it = each.release == arm.release and each.sha256 in hashes and len(hashes) == 1
        if is_it and not each.runner.given_up and shelf.path_of(each.sha256) is not None:
            return each
    return None


def good_packages(shelf: Shelf, arm: PlanArm) -> list[Variant]:
    """Those of an arm's packages that are not in quarantine here, at least one.

    Raises: TrustError `release_quarantined`.
    """
    quarantined = shelf.quarantined()
    good = [each for each in arm.packages if each.sha256 not in quarantined]
    if not good:
        raise TrustError(
            "release_quarantined",
            f"every package of {arm.release} failed or was left on this device before",
            "publish a mended release; this one is not tried again here",
        )
    return good


def packages_kept(shelf: Shelf, arm: PlanArm) -> set[str]:
    """The hashes of an arm's packages that stay on the shelf: the chosen one, or else all."""
    chosen = shelf.chosen(arm.sha256)
    if chosen is None or chosen in shelf.quarantined():
        return {each.sha256 for each in arm.packages}
    return {chosen}


def _fits(trial: Arm, stable: Arm) -> bool:
    one, other = ((arm.info and arm.info.interface, arm.runner.scores) for arm in (trial, stable))
    return one == other


def _unfit(trial: Arm, stable: Arm) -> PackageError:
    return PackageError(
        "bad_arms",
        f"{trial.release} takes other events than {stable.release}, and is not tried beside it",
        "a new interface is released to the stable arm alone",
    )


@contextmanager
def _quarantining(shelf: Shelf, package: Variant) -> Iterator[None]:
    try:
        yield
    except PackageError as error:
        blameless = error.code in ("hash_mismatch", "missing_extra")  # disk or machine failed it
        was_read = not blameless and not isinstance(error.__cause__, OSError)
        if shelf.path_of(package.sha256, anew=True) is not None and was_read:
            shelf.quarantine(package.sha256, error.code)
        raise


def _from_shelf(shelf: Shelf, package: Variant) -> Path:
    path = shelf.path_of(package.sha256)
    if path is None:
        raise PackageError(
            "not_on_shelf", f"package {package.path} is missing or damaged on the shelf"
        )
    return path
