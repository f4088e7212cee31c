"""A device's own key signs its reports, and what hears them believes them by it."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest

from cloud_learner.floors import Floors
from cloud_learner.reports import Reports
from edge_runtime.bus import nkey
from edge_runtime.bus.access import Access, of_device
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.errors import TransportError
from edge_runtime.rollout.agent import Agent
from edge_runtime.update.trust import Freshness
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, Report


class Away:
    """An update client that reaches nothing."""

    freshness = Freshness()

    def refresh(self) -> None:
        raise TransportError("unreachable", "nothing is there")


def first_report(trials, access):
    """The first report that an agent of the device sends, as it is heard."""

    async def scene():
        bus = await MemoryBroker().connect()
        await bus.ensure_stream(
            subjects.STATE_STREAM, subjects.STATE_ALL, max_bytes=1 << 20, discard_new=False
        )
        queue = asyncio.Queue()
        subscription = await bus.subscribe(subjects.report("EWR"), queue.put)
        with trials.open() as runtime:
            agent = Agent(
                *(runtime, Away(), runtime.shelf, bus),
                attributes={},
                poll_s=1000.0,
                sign=access.sign,
            )
            running = asyncio.create_task(agent.run())
            message = await asyncio.wait_for(queue.get(), 10)
            running.cancel()
            await asyncio.wait([running])
        await subscription.close()
        return message

    return asyncio.run(scene())


def test_a_report_is_signed_by_the_key_that_init_made(trials, tmp_path):
    key = nkey.create(trials.config.own_key)
    message = first_report(trials, of_device(trials.config))
    reports = Reports(lambda: {"EWR": key.public}, Floors(tmp_path / "floors.json").is_news)
    report = reports.believed(message)
    assert report is not None
    assert (report.device, report.number) == ("EWR", 1)


def test_a_device_without_a_key_signs_nothing(trials):
    message = first_report(trials, Access())
    assert codec.signature_in(message.headers) is None


@pytest.mark.parametrize("time_s", [float("nan"), float("inf"), 1e300])
def test_a_time_that_is_none_makes_no_report_new_for_ever(tmp_path, time_s):
    bare = Report(WIRE_VERSION, "a", 1, 0.0, {}, [], 0, {}, {}, [], 0, 0)
    floors = Floors(tmp_path / "floors.json")
    wild = msgspec.structs.replace(bare, number=5, time_s=time_s)
    assert floors.is_news(wild)
    assert not floors.is_news(wild)
    assert floors.is_news(msgspec.structs.replace(bare, number=6, time_s=1.0))
    floors.save()
    again = Floors(tmp_path / "floors.json")
    assert not again.is_news(wild)
    assert again.is_news(msgspec.structs.replace(bare, number=7, time_s=2.0))


def test_of_all_that_was_heard_once_nothing_is_news_in_any_order(tmp_path):
    bare = Report(WIRE_VERSION, "a", 1, 0.0, {}, [], 0, {}, {}, [], 0, 0)
    told = [
        msgspec.structs.replace(bare, epoch=epoch, number=number, time_s=time_s)
        for (epoch, number), time_s in zip(
            [(3, 1), (3, 2), (1, 1), (1, 2), (4, 1)], [10.0, 11.0, 12.0, 13.0, 2.0], strict=True
        )
    ]
    floors = Floors(tmp_path / "floors.json")
    assert [floors.is_news(each) for each in told] == [True] * 5
    for order in itertools.permutations(told):
        assert [floors.is_news(each) for each in order] == [False] * 5
