"""What leaves a device: a stable sample, without private fields, and so many bytes a day."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.config import UplinkConfig
from edge_runtime.events.withhold import Withhold, in_sample
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord, ObservationRecord, PredictionRecord, Scored

NOON_S = 20_000 * 86_400.0 + 43_200.0
SAMPLED_OUT, OVER_QUOTA = b"\x01", b"\x02"


def observation(family: str = "flight_delay", **fields: str) -> bytes:
    return codec.encode(ObservationRecord(family, "landed", 1.0, {"carrier": "UA", **fields}))


def withholding(
    path: Path, clock: ManualClock | None = None, epoch: int = 7, **rule: object
) -> Withhold:
    rules = {"flight_delay": UplinkConfig(**rule)}  # type: ignore[arg-type]
    return Withhold(rules, path / "quota", clock or ManualClock(NOON_S), epoch)


def kept(
    withhold: Withhold, records: list[bytes], *, base_seq: int = 1, event_class: str = "event"
) -> list[bytes]:
    return [bytes(raw) for raw in withhold.kept(event_class, 7, base_seq, records)]


def counts(withhold: Withhold) -> dict[str, int]:
    return withhold.statistics()["flight_delay"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_sample_holds_its_share_of_any_stretch_of_numbers(share: float) -> None:
    for epoch, start in ((1, 1), (1, 40_001), (1 << 40, 1), (12345, 7)):
        count = sum(in_sample(epoch, seq, share) for seq in range(start, start + 4000))
        assert abs(count / 4000 - share) < 0.03, (epoch, start)


def test_a_larger_sample_holds_all_of_a_smaller_one() -> None:
    small = {seq for seq in range(2000) if in_sample(5, seq, 0.2)}
    assert small < {seq for seq in range(2000) if in_sample(5, seq, 0.4)}


def test_the_sample_is_the_one_that_others_can_compute() -> None:
    # Frozen: the learner may reckon with it, and a new release must decide as the old one did.
    assert [seq for seq in range(1, 30) if in_sample(7, seq, 0.25)] == [2, 3, 7, 11, 14, 18, 21, 23]


def test_what_is_not_in_the_sample_keeps_its_number(tmp_path: Path) -> None:
    withhold = withholding(tmp_path, sample=0.5)
    data = observation()

    found = kept(withhold, [data] * 100)

    wanted = [data if in_sample(7, seq, 0.5) else SAMPLED_OUT for seq in range(1, 101)]
    assert found == wanted
    assert counts(withhold)["sent"] == wanted.count(data)
    assert counts(withhold)["sampled_out"] == wanted.count(SAMPLED_OUT)


def test_a_label_goes_where_its_prediction_went(tmp_path: Path) -> None:
    withhold = withholding(tmp_path, sample=0.5)
    labels = [codec.encode(LabelRecord("flight_delay", 3, seq, 1.0, 2.0)) for seq in range(1, 101)]

    found = kept(withhold, labels, base_seq=900, event_class="label")

    assert [data != SAMPLED_OUT for data in found] == [in_sample(3, n, 0.5) for n in range(1, 101)]


def test_other_families_and_what_cannot_be_read_go_as_they_are(tmp_path: Path) -> None:
    withhold = withholding(tmp_path, sample=0.0, redact=["carrier"], bytes_per_day=1)
    records = [observation("other"), b"\xc1", codec.encode([99, "of the future"])]
    odd = codec.encode(LabelRecord("flight_delay", -1, 1 << 63, 1.0, 2.0))

    assert kept(withhold, records) == records
    assert kept(withhold, [odd], base_seq=4) == [SAMPLED_OUT]
    assert counts(withhold)["sent"] == counts(withhold)["over_quota"] == 0


def test_redacted_fields_are_gone_and_all_else_is_as_it_was(tmp_path: Path) -> None:
    withhold = withholding(tmp_path, redact=["name", "seat"])
    fields = {"carrier": "UA", "name": "Ada", "distance": 1400}
    whole = PredictionRecord(
        "flight_delay", "scheduled", 1.5, fields, "s", b"\0\0\0\0", 0.5, [Scored("r", "a", [0.1])]
    )
    without = observation()

    found = kept(withhold, [codec.encode(whole), without, observation(seat="1A")])

    left = msgspec.structs.replace(whole, fields={"carrier": "UA", "distance": 1400})
    assert found == [codec.encode(left), without, without]
    assert counts(withhold)["redacted"] == 2
    assert counts(withhold)["sent"] == 3


def test_beyond_the_quota_events_stay_until_the_next_day_and_labels_go(tmp_path: Path) -> None:
    clock, data = ManualClock(NOON_S), observation()
    label = codec.encode(LabelRecord("flight_delay", 7, 1, 1.0, 2.0))
    withhold = withholding(tmp_path, clock, bytes_per_day=3 * len(data) + 5)

    assert kept(withhold, [data] * 5) == [data] * 3 + [OVER_QUOTA] * 2
    assert kept(withhold, [label], event_class="label") == [label]
    clock.advance(43_199.0)
    assert kept(withhold, [data], base_seq=6) == [OVER_QUOTA]
    assert counts(withhold)["bytes_today"] == 3 * len(data)
    clock.advance(1.0)
    assert counts(withhold)["bytes_today"] == 0
    assert kept(withhold, [data] * 4, base_seq=7) == [data] * 3 + [OVER_QUOTA]
    assert counts(withhold)["over_quota"] == 4
    assert counts(withhold)["sent"] == 7


def test_a_small_event_does_not_slip_through_once_the_quota_is_reached(tmp_path: Path) -> None:
    large, small = observation(text="x" * 200), observation()
    withhold = withholding(tmp_path, bytes_per_day=len(large) + len(small))

    assert kept(withhold, [large, large, small]) == [large, OVER_QUOTA, OVER_QUOTA]


def test_what_goes_again_is_decided_as_before_and_not_counted(tmp_path: Path) -> None:
    clock, data = ManualClock(NOON_S), observation()
    withhold = withholding(tmp_path, clock, bytes_per_day=3 * len(data))
    first = kept(withhold, [data] * 6)
    clock.advance(86_400.0)
    first += kept(withhold, [data] * 5, base_seq=7)
    before = counts(withhold)

    assert kept(withhold, [data] * 11) == first
    assert kept(withhold, [data] * 4, base_seq=5) == first[4:8]
    assert counts(withhold) == before


@pytest.mark.parametrize("later_s", [3600.0, 86_400.0])
def test_the_days_bytes_and_decisions_survive_a_restart(tmp_path: Path, later_s: float) -> None:
    clock, data = ManualClock(NOON_S), observation()
    withhold = withholding(tmp_path, clock, bytes_per_day=4 * len(data))
    kept(withhold, [data] * 3)
    withhold.save()

    clock.advance(later_s)
    again = withholding(tmp_path, clock, bytes_per_day=4 * len(data))

    is_next_day = later_s > 40_000
    assert kept(again, [data] * 3) == [data] * 3  # sent before, not counted again
    assert counts(again)["bytes_today"] == (0 if is_next_day else 3 * len(data))
    later = kept(again, [data] * 5, base_seq=4)
    assert later == [data] * 4 + [OVER_QUOTA] if is_next_day else [data] + [OVER_QUOTA] * 4
    again.save()
    third = withholding(tmp_path, clock, bytes_per_day=4 * len(data))
    assert kept(third, [data] * 5, base_seq=4) == later


def test_the_file_is_written_rarely(tmp_path: Path) -> None:
    data = observation()
    withhold = withholding(tmp_path, bytes_per_day=1000 * len(data))
    saves = 0
    for seq in range(1, 2001):
        kept(withhold, [data], base_seq=seq)
        if withhold.unsaved:
            withhold.save()
            saves += 1
    assert 15 <= saves <= 18


def test_without_a_quota_there_is_no_file(tmp_path: Path) -> None:
    withhold = withholding(tmp_path, sample=0.5)
    kept(withhold, [observation()])
    withhold.save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"version": 9, "day": 1}', b'{"version": 1, "day": 1, "upto": [8, 1]}']
)
def test_a_file_of_no_use_is_said_and_counted_from_nothing(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "quota").write_bytes(content)
    data = observation()
    withhold = withholding(tmp_path, bytes_per_day=len(data))

    assert kept(withhold, [data] * 2) == [data, OVER_QUOTA]
    assert len(caplog.messages) == 1


def test_a_disk_that_refuses_the_file_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, gone = observation(), tmp_path / "quota"
    withhold = withholding(tmp_path, bytes_per_day=len(data))
    kept(withhold, [data])
    gone.mkdir()
    (gone / "in the way").touch()

    withhold.save()
    assert "not saved" in caplog.text
    (gone / "in the way").unlink()
    gone.rmdir()
    withhold.save()

    assert gone.is_file()
    assert not withhold.unsaved


def test_a_clock_that_jumps_begins_another_day_and_never_locks_the_family(tmp_path: Path) -> None:
    clock, data = ManualClock(NOON_S + 3650 * 86_400.0), observation()
    withhold = withholding(tmp_path, clock, bytes_per_day=len(data))
    assert kept(withhold, [data] * 2) == [data, OVER_QUOTA]
    withhold.save()

    again = withholding(tmp_path, ManualClock(NOON_S), bytes_per_day=len(data))

    assert kept(again, [data] * 2, base_seq=3) == [data, OVER_QUOTA]
