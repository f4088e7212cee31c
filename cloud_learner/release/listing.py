"""What the signed documents list: which releases of a family, and which of them a plan may name.

Why: a device finds what the documents name and nothing else; they must be short, and agree.

Invariants: a release keeps its content; a plan names what is listed, with that content and counter.

Knows nothing about keys, disks and the broker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuf.api.metadata import TargetFile  # type: ignore[attr-defined] # tuf has no __all__

from cloud_learner.release.metadata import ReleaseFile
from edge_runtime.errors import TrustError
from edge_runtime.rollout.plan import Plan

Listed = Mapping[str, TargetFile]


def with_release(
    listed: Listed, release: ReleaseFile, plans: Sequence[Plan | None]
) -> dict[str, TargetFile]:
    """A family's list with `release`, and of all others those that `plans` name.

    Raises: TrustError (release_exists).
    """
    targets = release.targets()
    for path, target in targets.items():
        old = listed.get(path)
        if old is not None and old.hashes != target.hashes:
            raise TrustError(
                "release_exists",
                f"{path} is published with other content; nothing is published",
                "give the release a name of its own",
            )
    named = [plan for plan in plans if plan is not None and plan.family == release.family]
    live = {package.path for plan in named for arm in plan.named for package in arm.packages}
    return {path: target for path, target in listed.items() if path in live} | targets


def check_plan(listed: Listed, plan: Plan) -> None:
    """Refuse a plan that names what is not listed. Raises: TrustError (plan_names_unreleased)."""
    for arm in plan.named:
        for package in arm.packages:
            target = listed.get(package.path)
            facts = target and (target.hashes["sha256"], target.custom["counter"])
            if facts != (package.sha256, arm.counter):
                raise TrustError(
                    "plan_names_unreleased",
                    f"plan {plan.seq} names {package.path}, not released with that content",
                )
