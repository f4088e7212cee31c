"""What a family's declaration says to the domains that judge: limits, shares, rules of a campaign.

Why: the bootstrap, the host and whoever judges elsewhere must read the same declaration in the same
way; the gate and the campaign themselves know no families.

Invariants: what a declaration says is read here and nowhere else; a home that learns under another
feature spec, or for another number of classes, is refused.
"""

from __future__ import annotations

import msgspec

from cloud_learner.config import Home
from cloud_learner.evaluate.gates import Limits
from cloud_learner.evaluate.holdout import SHARE_MAX, HoldOut
from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.rules import Rules as LabelRules
from cloud_learner.package.inspect import outputs_of, spec_of
from cloud_learner.rollout.state import Rules
from cloud_learner.store.registry import Registry
from cloud_learner.train.declaration import FamilyConfig
from cloud_learner.train.family import Family
from edge_runtime.errors import ConfigError

HOLD_OUT_ROWS = 3000


def label_rules(
    config: FamilyConfig,
    *,
    idle_s: float,
    learn_from_s: float = float("-inf"),
) -> LabelRules:
    """What the joiner must know of a family's `[label]`, its clock and its task."""
    return LabelRules(
        family=config.name,
        label_window_s=config.label.window_s,
        idle_s=idle_s,
        expiry=config.label.expiry,
        amend_s=config.label.amend_s,
        learn_from_s=learn_from_s,
        ahead_s_max=config.skew_s_max if config.clock == "wall" else float("inf"),
        window_field=config.label.window_field,
        policy=config.label.policy,
        early_s=config.label.early_s,
        weight_max=config.label.weight_max,
        task=config.task,
    )


def batcher(config: FamilyConfig, rules: LabelRules) -> Batcher:
    """What cuts a family's micro-batches. Raises: ConfigError `bad_cap`."""
    learning = config.learning
    return Batcher(learning.batch_size, learning.device_cap, learning.batch_s, rules.released_s)


def campaign_rules(family: Family) -> Rules:
    """The campaign's rules from the family's `[rollout]` and `[task]`."""
    section = msgspec.to_builtins(family.config.rollout)
    task = msgspec.to_builtins(family.config.task)
    facts = {"family": family.name, "task": task, "window": _window(section["window"])}
    facts["is_by_arrival"] = family.config.label.policy == "arrival"
    return msgspec.convert({**section, **facts}, Rules)


def _window(text: str) -> dict[str, int] | None:
    """What `22:00-04:00` comes to in minutes of the day."""
    if not text:
        return None
    first, last = ([int(part) for part in each.split(":")] for each in text.split("-"))
    return {"from_min": first[0] * 60 + first[1], "to_min": last[0] * 60 + last[1]}


def gate_limits(family: Family) -> Limits:
    """The offline gate's limits from the family's `[gates]`, and what else bounds its rules."""
    config = family.config
    return msgspec.convert(
        {
            **msgspec.to_builtins(config.gates),
            "variants": config.rollout.variants,
            "task": msgspec.to_builtins(config.task),
            "tighten": config.drift.tighten,
            "device_share": device_share(family),
        },
        Limits,
    )


def check_spec(home: Home, family: Family) -> None:
    """Raises: ConfigError (other_spec, other_classes) when the home learns under other features
    than these, or for answers of another width.
    """
    known = Registry(home.registry).path(home.of(family.name).origin().sha256)
    if spec_of(known).hash != family.spec.hash:
        raise ConfigError(
            "other_spec",
            f"{family.folder / 'features.toml'} is not what {home.root} learns {family.name} "
            "under: it changed, or a backfill did not end; nothing was changed",
            f"cloud-learner backfill {family.folder} --home {home.root}",
        )
    if (outputs := outputs_of(known)) != family.config.task.outputs:
        raise ConfigError(
            "other_classes",
            f"{family.folder / 'family.toml'} asks for answers of {family.config.task.outputs} "
            f"numbers, and {home.root} learns {family.name} with {outputs}; nothing was changed",
            f"go back to {outputs} in family.toml and network.py; for more classes, bootstrap a"
            " family of another name into the same home, as models/README.md says",
        )


def device_share(family: Family) -> float:
    """What one device may have of the hold-out: no more than of a micro-batch, and half at most."""
    learning = family.config.learning
    return min(SHARE_MAX, learning.device_cap / learning.batch_size)


def recent_hold_out(family: Family) -> HoldOut:
    """An empty hold-out of the family; `load` brings back what an earlier process kept."""
    config = family.config
    return HoldOut(
        HOLD_OUT_ROWS,
        share=device_share(family),
        rows_min=config.gates.recent_rows_min,
        task=config.task,
        fields=config.gates.slices,
    )
