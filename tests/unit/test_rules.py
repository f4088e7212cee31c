"""What a family's declaration makes of the gate's limits and of its hold-out."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cloud_learner.rules import campaign_rules, device_share, gate_limits
from cloud_learner.stats.tasks import Task
from cloud_learner.train.family import Family

FOLDER = Path(__file__).parents[2] / "models" / "flight_delay"


def family(**sections) -> Family:
    loaded = Family.load(FOLDER)
    changed = {
        name: msgspec.structs.replace(getattr(loaded.config, name), **changes)
        for name, changes in sections.items()
    }
    config = msgspec.structs.replace(loaded.config, **changed)
    return Family(loaded.folder, config, loaded.spec, loaded._network)


def test_limits_are_those_of_the_family():
    limits = gate_limits(family(gates={"slices": ("carrier",)}, drift={"tighten": 0.25}))

    assert (limits.slices, limits.tighten, limits.device_share) == (("carrier",), 0.25, 0.5)
    assert limits.quality_min == 0.6


@pytest.mark.parametrize(("cap", "share"), [(500, 0.5), (250, 0.5), (15, 0.03)])
def test_a_device_has_no_larger_share_of_the_hold_out_than_of_a_micro_batch(cap, share):
    assert device_share(family(learning={"device_cap": cap})) == share


def test_a_campaign_knows_the_task():
    task = {"kind": "regression", "scale": 3.0}

    assert campaign_rules(family(task=task)).task == Task(**task)
