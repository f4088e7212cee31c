"""What devices confirmed is remembered, and a floor that goes back is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_learner.floors import Floors
from edge_runtime.wire.messages import WIRE_VERSION, Report


def report(device: str, *floor: int) -> Report:
    return Report(
        WIRE_VERSION, device, 1, 0.0, {}, [], 1, {}, {}, [], 0, 0, floor=list(floor), issued_s=0.0
    )


def test_a_floor_that_rises_is_no_news_and_survives_a_restart(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "floors.json")
    for floor in ((0, 0), (1, 3), (1, 3), (1, 9), (2, 1)):  # a new root begins anew
        floors.hear(report("a", *floor), 1.0)
    assert floors.restored() == {}
    floors.save()
    floors = Floors(tmp_path / "floors.json")
    floors.hear(report("b", 1, 9), 2.0)
    floors.hear(report("a", 1, 9), 3.0)
    assert floors.restored() == {"a": {"times": 1, "last_s": 3.0, "below": 1}}


def test_going_back_counts_once_until_it_has_caught_up(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "floors.json")
    for at, timestamp in enumerate((9, 4, 5, 9, 10, 4)):
        floors.hear(report("a", 1, timestamp), float(at))
    assert floors.restored() == {"a": {"times": 2, "last_s": 5.0, "below": 1}}


def test_a_device_that_forgot_everything_went_back_too(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "floors.json")
    floors.hear(report("a", 1, 9), 1.0)
    floors.hear(report("a", 0, 0), 2.0)
    assert floors.restored()["a"]["times"] == 1


@pytest.mark.parametrize("data", [b"", b"{}", b"\x00" * 99])
def test_a_file_that_cannot_be_read_is_learned_anew(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "floors.json"
    path.write_bytes(data)
    floors = Floors(path)
    floors.hear(report("a", 1, 2), 1.0)
    floors.save()
    assert Floors(path).devices["a"].floor == [1, 2]


def test_a_disk_that_takes_nothing_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "away"
    folder.write_bytes(b"")
    floors = Floors(folder / "floors.json")
    floors.hear(report("a", 1, 2), 1.0)
    with pytest.raises(OSError, match="away"):
        floors.save()
    folder.unlink()
    floors.save()
    assert Floors(folder / "floors.json").devices["a"].floor == [1, 2]
