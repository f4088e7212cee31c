"""What a family's declaration makes of the gate's limits and of its hold-out."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cloud_learner.rules import campaign_rules, device_share, gate_limits
from cloud_learner.stats.tasks import Task
from cloud_learner.train.declaration import LocalGates, Rollout
from cloud_learner.train.family import Family
from edge_runtime.rollout.plan import Window

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


def test_a_campaign_knows_its_stages_window_and_local_gates():
    rollout = {"stages": (1.0, 10.0, 100.0), "window": "22:30-04:05", "approve": True}
    rules = campaign_rules(family(rollout={**rollout, "gates": LocalGates(failures=5)}))

    assert (rules.stages, rules.approve) == ((1.0, 10.0, 100.0), True)
    assert rules.window == Window(22 * 60 + 30, 4 * 60 + 5)
    assert (rules.gates.failures, rules.gates.slowdown) == (5, 20.0)


def test_a_family_that_declares_no_stages_tries_a_release_on_all_its_canaries_at_once():
    rules = campaign_rules(family())

    assert (rules.stages, rules.shadow_rows, rules.window) == ((100.0,), 0, None)


@pytest.mark.parametrize(
    "section",
    [{"stages": []}, {"stages": [10, 10]}, {"stages": [0, 100]}, {"window": "24:00-01:00"}],
)
def test_stages_that_do_not_rise_and_windows_that_are_none_are_refused(section):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"selector": {}, **section}, Rollout)
