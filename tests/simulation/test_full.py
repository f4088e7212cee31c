"""Too much, for too long: the device's disk, the stream, and what is told of what was dropped.

Promises P6 (offline at ten times the cap) and P11 (the stream is full, the learner is away).
"""

from __future__ import annotations

import asyncio

from cloud_learner.broker import Broker
from cloud_learner.simulate.rig import (
    Cloud,
    Device,
    delivered,
    dialling,
    examples,
    missing_and_twice,
    until,
)
from edge_runtime.wire import subjects

CAP, SEGMENT = 256 << 10, 16 << 10


def test_ten_times_the_cap_offline_drops_the_oldest_events_and_tells_exactly_which(tmp_path):
    asyncio.run(offline(tmp_path))


async def offline(home):
    with Broker.start(home / "broker") as broker:
        to = dialling(broker.url)
        device = Device(home, "device", to, bytes_max=CAP, segment_bytes=SEGMENT, linger_ms=1)
        for _ in range(400):
            device.predict(50)
            await device.log.wait_durable("event", device.log.handed_out("event"))
            on_disk = sum(path.stat().st_size for path in (home / "device").iterdir())
            # A file may grow beyond its bound by one group before the next begins.
            assert on_disk <= CAP + 4 * SEGMENT
        await device.restart()  # what was dropped is known after a restart, too
        cloud = await Cloud.start(home / "learner", to)
        await device.connect()
        await delivered(cloud, device)
        accounts = cloud.accounts()
        durable = dict(device.ends())
        await device.stop()
        await cloud.stop()
    first = device.predicted[0][1]
    events, labels = accounts["device", first, "event"], accounts["device", first, "label"]
    assert events.dropped["dropped"] > 10_000
    assert sum(events.dropped.values()) + events.archived + events.quarantined == 20_000
    assert sum(labels.dropped.values()) + labels.archived + labels.quarantined == 20_000
    for lane, end in durable.items():
        assert accounts[lane].seq == end
    kept = [each for each in device.predicted if each[2] > events.dropped["dropped"]]
    labelled = [each for each in kept if each[2] > sum(labels.dropped.values())]
    assert missing_and_twice(labelled, examples(home / "learner")) == (0, 0)


def test_labels_outlive_events(tmp_path):
    device = Device(tmp_path, "device", None, bytes_max=CAP, segment_bytes=SEGMENT, linger_ms=1)
    for _ in range(70):
        device.predict(50)
        asyncio.run(device.log.wait_durable("event", device.log.handed_out("event")))
    event = device.log.piece("event", device.log.epoch, 0, 1 << 20, 1)
    label = device.log.piece("label", device.log.epoch, 0, 1 << 20, 1)
    device.log.close()

    assert event.skipped > 0
    assert event.reason == "dropped"
    assert label.skipped == 0


def test_a_full_stream_is_waited_for_and_drains_by_itself_when_the_learner_comes(tmp_path):
    asyncio.run(full_stream(tmp_path))


async def full_stream(home):
    with Broker.start(home / "broker") as broker:
        to = dialling(broker.url)
        operator = await to("operator")
        for name, wanted in (
            (subjects.EVENTS_STREAM, [subjects.EVENTS_ALL]),
            (subjects.STATE_STREAM, subjects.STATE_ALL),
        ):
            await operator.ensure_stream(name, wanted, max_bytes=2_000, discard_new=True)
        device = Device(home, "device", to)
        device.predict(400)  # in less event time than labels may lag by
        uplink = await device.connect()
        failed = lambda: uplink.statistics().get("failed_stream_full", 0)  # noqa: E731
        await until(lambda: failed() >= 1)
        await asyncio.sleep(1.0)  # by then the first window of each class is refused whole
        before = failed()
        await asyncio.sleep(3.0)  # how often it tries meanwhile is what is looked at
        tries = failed() - before
        cloud = await Cloud.start(home / "learner", to)  # which also brings the bounds to its own
        await delivered(cloud, device)
        await device.stop()
        await cloud.stop()
        await operator.close()
    assert 1 <= tries <= 16  # both classes, at first after a moment, then once a second
    assert missing_and_twice(device.predicted, examples(home / "learner")) == (0, 0)
