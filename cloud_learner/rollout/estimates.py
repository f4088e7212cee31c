"""What other releases, or other shares of them, would have earned, from answers in the archive.

Why: devices log with what propensity each answer was drawn, so the answers under one plan say what
another one would have earned, without trying it (off-policy estimation).

Invariants: all requests count at which the releases in question were resident and answers were
drawn, whoever answered; each counts once, in its mature form. Of `quality` the reward of each
release is known at each request; of `reward` only that of the one that answered, and the model that
DR corrects, the mean of each release, never saw the request that it is asked about.

Knows nothing about where the archive lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.rollout.rewards import Outcome
from cloud_learner.stats import offpolicy
from cloud_learner.stats.offpolicy import Estimate
from cloud_learner.stats.tasks import Task
from cloud_learner.store.archive import Archive
from edge_runtime.errors import RequestError

Floats = npt.NDArray[np.float64]

_FOLDS = 2

_SQL = """
SELECT scored, propensity, label FROM (
  SELECT *, row_number() OVER (PARTITION BY device, epoch, seq ORDER BY revision DESC) AS place
  FROM examples WHERE family = '{family}' AND NOT early AND len(scored) > 1
) WHERE place = 1 AND propensity > 0 AND propensity < 1 ORDER BY time_s, device, epoch, seq
"""


class Logged(NamedTuple):
    """Requests that any of `releases` could have answered: the one that did (`arms`, -1 for another
    one), its reward and propensity, of shape (rows,); with `qualities`, of shape (rows, releases).
    """

    releases: list[str]
    arms: npt.NDArray[np.intp]
    rewards: Floats
    logged: Floats
    qualities: Floats | None


class Estimated(msgspec.Struct, frozen=True):
    """What a choice would have earned, by each method; `shares` is the choice."""

    name: str
    shares: dict[str, float]
    rows: int
    ips: Estimate
    snips: Estimate
    dr: Estimate


def read(
    archive: Archive, family: str, releases: Sequence[str], outcome: Outcome, task: Task
) -> Logged:
    """What the archive holds of `releases`, or where none is named, of those that competed last.

    Raises: RequestError `nothing_logged`, `unknown_release`.
    """
    table: Any = archive.query(_SQL.format(family=family.replace("'", "''")))
    rows = table.fetchall()
    if not rows:
        raise RequestError(
            "nothing_logged",
            f"the archive holds no answer of {family} that was drawn between releases",
            "a canary, a comparison or a bandit logs some",
        )
    names = list(releases) or sorted(each["release"] for each in rows[-1][0])
    kept = list(_fitting(rows, names, task))
    if not kept:
        raise RequestError("unknown_release", f"{' and '.join(names)} never stood side by side")
    arms = np.array([arm for arm, *_ in kept], np.intp)
    labels = np.array([label for _, _, label, _ in kept], np.float32)
    logged = np.array([propensity for _, propensity, _, _ in kept], np.float64)
    if outcome == "reward":
        rewards = np.array([task.reward(float(label)) for label in labels])
        return Logged(names, arms, rewards, logged, None)
    answers = np.array([outputs for *_, outputs in kept], np.float32)
    losses = [task.bounded_losses(labels, answers[:, arm]) for arm in range(len(names))]
    qualities = 1.0 - np.stack(losses, axis=1)
    return Logged(names, arms, qualities[np.arange(len(arms)), arms], logged, qualities)


def estimated(logged: Logged, name: str, shares: Mapping[str, float]) -> Estimated:
    """What `shares` of the releases would have earned; they are taken relative to their sum."""
    total = sum(shares.values())
    target = np.array([shares.get(release, 0.0) / total for release in logged.releases])
    rows = np.arange(len(logged.arms))
    chance, model = np.where(logged.arms < 0, 0.0, target[logged.arms]), _model(logged)
    numbers = (logged.rewards, chance, logged.logged)
    return Estimated(
        name,
        dict(zip(logged.releases, target.tolist(), strict=True)),
        len(rows),
        offpolicy.ips(*numbers),
        offpolicy.snips(*numbers),
        offpolicy.dr(*numbers, model[rows, logged.arms], model @ target),
    )


def table(logged: Logged, shares: Mapping[str, float]) -> list[Estimated]:
    """Each release alone, and the shares that are asked about."""
    found = [estimated(logged, release, {release: 1.0}) for release in logged.releases]
    return [*found, estimated(logged, "shares", shares)] if shares else found


def _fitting(
    rows: Sequence[tuple[list[dict[str, Any]], float, float]], names: Sequence[str], task: Task
) -> Iterator[tuple[int, float, float, list[list[float]]]]:
    """Arm, propensity, label and the answers of all `names`, where they stood side by side."""
    for scored, propensity, label in rows:
        outputs = {each["release"]: each["outputs"] for each in scored}
        answers = [outputs.get(name) or [] for name in names]
        is_usable = all(None not in each and task.is_answer(each) for each in answers)
        if is_usable and not task.why_unfit(label):
            answering = scored[0]["release"]
            arm = names.index(answering) if answering in names else -1
            yield arm, propensity, label, answers


def _model(logged: Logged) -> Floats:
    """What each release earns at each request, as far as others tell; of shape (rows, releases)."""
    if logged.qualities is not None:
        return logged.qualities
    folds = np.arange(len(logged.arms)) % _FOLDS
    model = np.zeros((len(logged.arms), len(logged.releases)))
    for fold in range(_FOLDS):
        for arm in range(len(logged.releases)):
            others = logged.rewards[(folds != fold) & (logged.arms == arm)]
            model[folds == fold, arm] = others.mean() if len(others) else 0.0
    return model
