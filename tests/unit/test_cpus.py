"""How many CPUs are usable: affinity of a real process, quotas of real files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import cpus

ROOT = Path(__file__).parents[2]
ALL = len(os.sched_getaffinity(0))


@pytest.fixture
def groups(tmp_path: Path):
    """`groups("0::/a", {"a/cpu.max": "..."})` are the two paths that `usable` is given."""

    def write(text: str, files: dict[str, str]) -> tuple[Path, Path]:
        (tmp_path / "cgroup").write_text(text)
        for name, content in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(content + "\n")
        return tmp_path / "cgroup", tmp_path / "fs"

    return write


def test_affinity_counts() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from edge_runtime import cpus; print(cpus.usable())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


def test_without_a_quota_affinity_alone_counts(tmp_path: Path, groups) -> None:
    assert cpus.usable(tmp_path / "none", tmp_path / "none") == ALL
    assert cpus.usable(*groups("0::/a\n", {"a/cpu.max": "max 100000"})) == ALL
    v1 = {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}
    assert cpus.usable(*groups("3:cpu,cpuacct:/a\n", v1)) == ALL


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000"}),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}),
        ("0::/\n", {"cpu.max": "100000 100000"}),
        ("0::/host/only\n", {"cpu.max": "150000 100000"}),
        (
            "5:memory:/a\n3:cpu,cpuacct:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"},
        ),
        ("0::/a\n", {"a/cpu.max": "5000 100000"}),
    ],
    ids=["own", "above", "namespace", "container", "v1", "less than one"],
)
@pytest.mark.skipif(ALL < 2, reason="with one CPU no quota can be seen")
def test_the_tightest_quota_on_the_way_up_counts_and_one_cpu_is_left(
    groups, text: str, files: dict[str, str]
) -> None:
    assert cpus.usable(*groups(text, files)) == 1


def test_a_quota_above_the_affinity_changes_nothing(groups) -> None:
    assert cpus.usable(*groups("0::/a\n", {"a/cpu.max": "99900000 100000"})) == ALL


def test_a_quota_that_cannot_be_read_limits_nothing(groups) -> None:
    for content in ("", "max", "1", "0 0", "many 100000", "100000 -1"):
        assert cpus.usable(*groups("0::/a\n", {"a/cpu.max": content})) == ALL


@pytest.mark.parametrize("name", ["flags\t\t", "Features\t"])
def test_flags_are_those_of_the_first_processor(tmp_path: Path, name: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: x\n{name}: fpu avx2 avx_vnni\n\n{name}: fpu\n")
    assert cpus.flags(path) == {"fpu", "avx2", "avx_vnni"}


def test_flags_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert cpus.flags(tmp_path / "none") == frozenset()


def test_this_machine_can_be_asked() -> None:
    assert 1 <= cpus.usable() <= ALL
    assert cpus.flags()
