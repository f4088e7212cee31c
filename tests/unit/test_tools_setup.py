"""tools/setup: says in one line what is missing, and does nothing when all is in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/setup", tmp_path / "tools/setup")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def run_setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["tools/setup"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def interpreter(checkout: Path, *, refuses: str) -> str:
    """A program that runs like Python, except that it fails for code which holds `refuses`."""
    path = checkout / "python"
    path.write_text(
        f'#!/bin/sh\ncase "$2" in *"{refuses}"*) exit 1;; *print*) echo python3.11;; esac\nexit 0\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def installs(checkout):
    """What `tools/setup` asks its pip for, in order; a request that names `refused` fails."""
    path = checkout / ".venv/bin/python"
    path.parent.mkdir(parents=True)
    path.write_text(
        """#!/bin/sh
        case "$*" in *--dry-run*) exit;; *" install "*) echo "$*" >> asked;; esac
        case "$*" in *"$REFUSED"*) exit 1;; esac
        """
    )
    path.chmod(0o755)

    def asked(refused: str = "nothing") -> tuple[int, list[str]]:
        python = interpreter(checkout, refuses="nothing")
        done = run_setup(checkout, PYTHON=python, REFUSED=refused)
        lines = (checkout / "asked").read_text().splitlines()
        (checkout / "asked").unlink()
        return done.returncode, [line.partition(" install ")[2] for line in lines]

    return asked


def test_an_interpreter_that_is_too_old_is_named(checkout):
    python = interpreter(checkout, refuses="version_info <")

    result = run_setup(checkout, PYTHON=python)

    assert result.returncode == 1
    assert f"error: PYTHON={python} is not a Python 3.11 or newer." in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_missing_venv_module_gets_the_package_to_install(checkout):
    python = interpreter(checkout, refuses="ensurepip")

    result = run_setup(checkout, PYTHON=python)

    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: {python} has no venv module; Headwater installs only into .venv.",
        "hint: apt install python3.11-venv",
    ]


def test_a_matching_stamp_means_nothing_to_do(checkout):
    stamp = subprocess.run(
        ["cksum"], input=(checkout / "pyproject.toml").read_bytes(), capture_output=True, check=True
    ).stdout
    (checkout / ".venv").mkdir()
    (checkout / ".venv/headwater-stamp").write_bytes(stamp)

    result = run_setup(checkout, PYTHON="/nonexistent")

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_changed_pyproject_means_work_to_do(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/headwater-stamp").write_text("of an older pyproject.toml\n")

    assert run_setup(checkout, PYTHON="/nonexistent").returncode == 1


def test_weights_come_last_and_alone_in_the_version_of_the_pyproject(installs):
    [weights] = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["weights"]

    code, asked = installs()

    assert code == 0
    assert asked == ["--editable .[learner,demo,dev]", f"--no-deps {weights}"]


def test_a_set_up_that_was_interrupted_is_taken_up_again(checkout, installs):
    code, asked = installs(refused="--no-deps")

    assert (code, len(asked)) == (1, 2)
    assert not (checkout / ".venv/headwater-stamp").exists()
    assert installs()[0] == 0
    assert run_setup(checkout, PYTHON="/nonexistent").returncode == 0
