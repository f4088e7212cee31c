"""The shelf: whole packages or none, proven content, and what survives a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import CapacityError, TransportError, TrustError
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.update.shelf import Shelf

DATA = b"package" * 1000
SHA = hashlib.sha256(DATA).hexdigest()


def plan(seq: int, family: str = "f") -> Plan:
    return Plan(family=family, seq=seq, stable=PlanArm("r", model_path(family, "r"), SHA, 1, 1.0))


def files(shelf_dir: Path) -> list[str]:
    return sorted(path.name for path in (shelf_dir / "packages").iterdir())


def test_a_package_is_found_by_its_content_also_after_a_restart(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    assert shelf.path_of(SHA) is None
    path = shelf.put(SHA, [DATA[:10], DATA[10:]])
    assert path.read_bytes() == DATA
    assert shelf.path_of(SHA) == path
    assert Shelf(tmp_path).path_of(SHA) == path


def test_a_stored_package_is_not_fetched_again(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put(SHA, [DATA])

    def never() -> Iterator[bytes]:
        raise AssertionError("asked for a chunk")
        yield b""

    shelf.put(SHA, never())
    assert shelf.statistics()["put"] == 1


def test_other_content_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with pytest.raises(TrustError, match="hash_mismatch"):
        shelf.put(SHA, [DATA[:-1]])
    assert shelf.path_of(SHA) is None
    assert files(tmp_path) == []


def test_a_fetch_that_breaks_off_leaves_no_trace(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield DATA[:10]
        raise TransportError("unreachable", "gone")

    shelf = Shelf(tmp_path)
    with pytest.raises(TransportError):
        shelf.put(SHA, broken())
    assert files(tmp_path) == []


def test_what_a_crash_left_half_written_is_removed_at_the_start(tmp_path: Path) -> None:
    Shelf(tmp_path)
    (tmp_path / "packages" / f".{SHA}.part").write_bytes(DATA[:10])
    shelf = Shelf(tmp_path)
    assert files(tmp_path) == []
    assert shelf.path_of(SHA) is None


def test_a_package_damaged_on_disk_is_dropped_at_its_first_use(tmp_path: Path) -> None:
    Shelf(tmp_path).put(SHA, [DATA]).write_bytes(DATA[:-1] + b"?")
    shelf = Shelf(tmp_path)
    assert shelf.path_of(SHA) is None
    assert shelf.statistics()["corrupt"] == 1
    assert shelf.put(SHA, [DATA]).read_bytes() == DATA


def test_a_disk_that_cannot_be_written_is_a_capacity_error(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    (tmp_path / "packages").rmdir()
    (tmp_path / "current").write_bytes(b"a file where a directory belongs")
    with pytest.raises(CapacityError, match="shelf_unwritable"):
        shelf.put(SHA, [DATA])
    with pytest.raises(CapacityError, match="shelf_unwritable"):
        shelf.save_current(plan(1))


def test_pruning_keeps_what_it_is_told_to_keep(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    other = hashlib.sha256(b"other").hexdigest()
    shelf.put(SHA, [DATA])
    shelf.put(other, [b"other"])
    assert shelf.prune({SHA}) == 1
    assert shelf.path_of(other) is None
    assert shelf.path_of(SHA) is not None


def test_the_current_plan_of_each_family_survives_a_restart(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    assert shelf.load_current("f") is None
    shelf.save_current(plan(1))
    shelf.save_current(plan(2))
    shelf.save_current(plan(7, "g"))
    reborn = Shelf(tmp_path)
    assert reborn.load_current("f") == plan(2)
    assert reborn.load_current("g") == plan(7, "g")


def test_a_damaged_current_plan_is_named(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.save_current(plan(1))
    (tmp_path / "current" / "f.json").write_bytes(b"{")
    with pytest.raises(TrustError, match="bad_plan"):
        shelf.load_current("f")


def test_quarantine_survives_a_restart(tmp_path: Path) -> None:
    Shelf(tmp_path).quarantine(SHA, "golden_mismatch")
    assert Shelf(tmp_path).quarantined() == {SHA: "golden_mismatch"}


def test_an_unreadable_quarantine_is_named(tmp_path: Path) -> None:
    Shelf(tmp_path).quarantine(SHA, "golden_mismatch")
    (tmp_path / "quarantine.json").write_bytes(b"")
    with pytest.raises(TrustError, match="quarantine_unreadable"):
        Shelf(tmp_path)
