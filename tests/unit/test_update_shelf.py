"""The shelf: whole packages or none, proven content, and what survives a restart."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import CapacityError, TransportError, TrustError
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.update.shelf import Shelf

DATA = b"package" * 1000
SHA = hashlib.sha256(DATA).hexdigest()
FIRST_FORMAT = Path(__file__).parents[1] / "fixtures" / "shelf-1"


def plan(seq: int, family: str = "f") -> Plan:
    return Plan(family=family, seq=seq, stable=PlanArm("r", model_path(family, "r"), SHA, 1, 1.0))


def files(shelf_dir: Path) -> list[str]:
    return sorted(path.name for path in (shelf_dir / "packages").iterdir())


def test_a_package_is_found_by_its_content_also_after_a_restart(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    assert shelf.path_of(SHA) is None
    path = shelf.put(SHA, len(DATA), lambda _first: [DATA[:10], DATA[10:]])
    assert path.read_bytes() == DATA
    assert shelf.path_of(SHA) == path
    assert Shelf(tmp_path).path_of(SHA) == path


def test_a_stored_package_is_not_fetched_again(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put_whole(SHA, DATA)

    def never(_first: int) -> Iterator[bytes]:
        raise AssertionError("asked for a chunk")
        yield b""

    shelf.put(SHA, len(DATA), never)
    assert shelf.statistics()["put"] == 1


def test_other_content_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with pytest.raises(TrustError, match="hash_mismatch"):
        shelf.put(SHA, len(DATA), lambda _first: [DATA[:-1]])
    assert shelf.path_of(SHA) is None
    assert files(tmp_path) == []


def test_a_fetch_that_breaks_off_leaves_no_trace(tmp_path: Path) -> None:
    def broken(_first: int) -> Iterator[bytes]:
        yield DATA[:10]
        raise TransportError("unreachable", "gone")

    shelf = Shelf(tmp_path)
    with pytest.raises(TransportError):
        shelf.put(SHA, len(DATA), broken)
    assert files(tmp_path) == []


def test_what_a_crash_left_half_written_is_no_package_and_goes_with_the_next_pruning(
    tmp_path: Path,
) -> None:
    Shelf(tmp_path)
    (tmp_path / "packages" / f".{SHA}.part").write_bytes(DATA[:10])
    shelf = Shelf(tmp_path)
    assert shelf.path_of(SHA) is None
    shelf.prune(set())
    assert files(tmp_path) == []


def test_a_package_damaged_on_disk_is_dropped_at_its_first_use(tmp_path: Path) -> None:
    Shelf(tmp_path).put_whole(SHA, DATA).write_bytes(DATA[:-1] + b"?")
    shelf = Shelf(tmp_path)
    assert shelf.path_of(SHA) is None
    assert shelf.statistics()["corrupt"] == 1
    assert shelf.put_whole(SHA, DATA).read_bytes() == DATA


def test_a_disk_that_cannot_be_written_is_a_capacity_error(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    (tmp_path / "packages").rmdir()
    (tmp_path / "current").rmdir()
    (tmp_path / "current").write_bytes(b"a file where a directory belongs")
    with pytest.raises(CapacityError, match="shelf_unwritable"):
        shelf.put_whole(SHA, DATA)
    with pytest.raises(CapacityError, match="shelf_unwritable"):
        shelf.save_current(plan(1))


def test_pruning_keeps_what_it_is_told_to_keep(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    other = hashlib.sha256(b"other").hexdigest()
    shelf.put_whole(SHA, DATA)
    shelf.put_whole(other, b"other")
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


def follow(shelf: Shelf, *releases: str) -> list[str | None]:
    """Make each release stable in turn; the stable releases of the current and previous plan."""
    for seq, release in enumerate(releases, start=1):
        sha256 = hashlib.sha256(release.encode()).hexdigest()
        stable = PlanArm(release, model_path("f", release), sha256, seq, 1.0)
        shelf.save_current(Plan(family="f", seq=seq, stable=stable))
    found = shelf.load_current("f"), shelf.load_previous("f")
    return [None if each is None else each.stable.release for each in found]


@pytest.mark.parametrize(
    ("releases", "kept"),
    [
        (["r1"], ["r1", None]),
        (["r1", "r2"], ["r2", "r1"]),
        (["r1", "r2", "r2", "r2"], ["r2", "r1"]),  # plans of a trial keep the stable release
        (["r1", "r2", "r3"], ["r3", "r2"]),
        (["r1", "r2", "r1"], ["r1", "r2"]),
    ],
)
def test_the_release_before_the_current_one_is_remembered(
    tmp_path: Path, releases: list[str], kept: list[str | None]
) -> None:
    assert follow(Shelf(tmp_path), *releases) == kept
    assert follow(Shelf(tmp_path)) == kept


def test_a_release_that_was_left_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    follow(shelf, "r1", "r2", "r3")
    shelf.quarantine(hashlib.sha256(b"r3").hexdigest(), "rolled_back")
    assert follow(shelf, "r2") == ["r2", None]


def test_a_shelf_of_the_first_format_is_read_and_carried_on(tmp_path: Path) -> None:
    shutil.copytree(FIRST_FORMAT, tmp_path, dirs_exist_ok=True)
    shelf = Shelf(tmp_path)
    old = shelf.load_current("toy")
    assert old is not None
    assert (old.seq, old.stable.release, old.stable.counter) == (7, "r1", 3)
    assert (old.canary is not None, old.selector) == (True, {"airport": "EWR"})
    assert shelf.load_previous("toy") is None
    assert list(shelf.quarantined().values()) == ["golden_mismatch"]
    shelf.save_current(plan(8, "toy"))
    assert shelf.load_previous("toy") == old


def test_a_later_format_is_refused_by_name(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.save_current(plan(1))
    path = tmp_path / "current" / "f.json"
    path.write_bytes(path.read_bytes().replace(b'"version":2', b'"version":3', 1))
    with pytest.raises(TrustError, match="version 3"):
        shelf.load_current("f")


def test_a_plan_takes_the_place_of_one_that_cannot_be_read(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.save_current(plan(1))
    (tmp_path / "current" / "f.json").write_bytes(b"{")
    shelf.save_current(plan(2))
    assert shelf.load_current("f") == plan(2)


def test_a_choice_survives_a_restart_and_leaves_with_its_package(tmp_path: Path) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    Shelf(tmp_path).choose(SHA, other)
    shelf = Shelf(tmp_path)
    assert shelf.chosen(SHA) == other
    shelf.prune({other})
    assert shelf.chosen(SHA) == other
    shelf.prune({SHA})
    assert shelf.chosen(SHA) is None


def test_choices_that_cannot_be_read_are_made_anew(tmp_path: Path) -> None:
    Shelf(tmp_path).choose(SHA, SHA)
    (tmp_path / "choices.json").write_bytes(b"{")
    assert Shelf(tmp_path).chosen(SHA) is None


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
