"""A rollout over whole devices: C7, and the way back of a whole fleet."""

from __future__ import annotations

import asyncio

import pytest

from cloud_learner.rollout.state import Rules
from cloud_learner.simulate.rollout_fleet import Site, roll_back
from edge_runtime.device.words import Event

EVENT = Event("scheduled", 0.0, {"carrier": "AA", "distance": 100.0})


@pytest.mark.parametrize(
    ("devices", "crews", "asleep"), [(6, 2, 1), pytest.param(200, 8, 10, marks=pytest.mark.slow)]
)
def test_c7_and_r8_a_fleet_goes_back_and_who_slept_never_tries_what_was_found_out(
    tmp_path, write_package, devices, crews, asleep
):
    names = [f"device-{number}" for number in range(devices)]
    old, new = write_package(0.0)[0], write_package(0.5)[0]

    async def main():
        site = Site(tmp_path, names, crews, EVENT, pace_s=0.2 * devices / 6)
        async with site.open(Rules(family="toy", selector={})):
            found = await roll_back(site, old, new, asleep=asleep, dwell_s=1.0)
            assert not any(site.reports.statistics().values())
            return found, site.controller.status()

    found, status = asyncio.run(main())

    in_last = len([name for name in names if names.index(name) * crews // devices == crews - 1])
    assert len(found.back_s) == devices - asleep - in_last
    assert len(found.killed_s) == in_last
    assert len(found.woken_s) == asleep
    assert found.woken_tried == 0
    assert (found.failed, found.requests > 0) == (0, True)
    assert found.answered_s <= max(found.back_s)
    assert status["counts"]["rolled_back"] == 1
    assert len(status["devices"]) == devices
