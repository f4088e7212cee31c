"""The `cloud-learner` command: what it says and what it exits with."""

from __future__ import annotations

import json
import socket

import pytest
from click.testing import CliRunner

from cloud_learner.cli import _guarded, main
from cloud_learner.config import Home
from cloud_learner.store.ingest_db import IngestDb, put_account
from cloud_learner.store.ingest_state import Account
from edge_runtime.errors import CapacityError, ConfigError, TransportError


@pytest.fixture
def learner():
    """`learner("status", ...)` runs a command."""
    return lambda *args: CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def nobody():
    """The url of a port on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can come
        yield f"nats://127.0.0.1:{held.getsockname()[1]}"


def test_help_shows_every_command_with_an_example(learner):
    shown = learner("--help")

    assert shown.exit_code == 0
    for command in main.commands:
        assert command in shown.stdout
        assert "Example: cloud-learner" in learner(command, "--help").stdout


def test_a_wrong_option_is_usage(learner):
    assert learner("serve", "--hme", "x").exit_code == 2


def test_serving_a_folder_that_is_no_home_says_how_to_make_one(learner, tmp_path):
    done = learner("serve", "--home", tmp_path)

    assert done.exit_code == 2
    assert str(tmp_path) in done.stderr
    assert f"hint: cloud-learner bootstrap FAMILY DATA --home {tmp_path}" in done.stderr
    assert done.stdout == ""


def test_a_family_whose_marker_is_damaged_is_named(learner, tmp_path):
    (tmp_path / "families" / "coin").mkdir(parents=True)
    (tmp_path / "families" / "coin" / "origin.json").write_text("{")

    done = learner("serve", "--home", tmp_path)

    assert (done.exit_code, "bad_origin" in done.stderr) == (2, True)


def test_a_home_that_knew_one_family_is_refused_and_left_as_it_is(learner, tmp_path):
    (tmp_path / "bootstrap.json").write_text("{}")

    done = learner("serve", "--home", tmp_path)

    assert (done.exit_code, "bad_version" in done.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["bootstrap.json"]


def test_a_broken_family_folder_is_an_operators_error(learner, coin, tmp_path):
    folder = coin.write_family(tmp_path / "f", {"family.toml": ("output", "outptu")})
    (tmp_path / "data.csv").write_text("event_time\n")

    done = learner("bootstrap", folder, tmp_path / "data.csv", "--home", tmp_path / "home")

    assert done.exit_code == 2
    assert "outptu" in done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("line", ["asked,left,much", "unasked,left,1"])
def test_a_bad_data_file_is_an_operators_error(learner, coin, tmp_path, line):
    folder = coin.write_family(tmp_path / "f")
    (tmp_path / "data.csv").write_text(f"event_time,kind,side,x,y\n1970-01-02T00:00:00Z,{line},\n")

    done = learner("bootstrap", folder, tmp_path / "data.csv", "--home", tmp_path / "home")

    assert done.exit_code == 2
    assert "data.csv" in done.stderr


def test_too_few_rows_are_said_before_anything_is_written(learner, coin, tmp_path):
    folder = coin.write_family(tmp_path / "f")
    data = coin.write_csv(tmp_path / "data.csv", coin.stream(100))

    done = learner("bootstrap", folder, data, "--home", tmp_path / "home")

    assert done.exit_code == 2
    assert "75 labelled rows" in done.stderr
    assert not (tmp_path / "home").exists()


def test_nobody_at_the_url_is_unreachable(learner, nobody):
    done = learner("status", "--nats", nobody)

    assert done.exit_code == 4
    assert nobody in done.stderr


@pytest.fixture
def home(tmp_path):
    """A home whose database holds accounts, and is being written to by this process."""
    db = IngestDb(Home(tmp_path).ingest_db)
    change = db.begin()
    dropped = {"dropped": 7, "sampled_out": 2}
    put_account(
        change, ("EWR", 5, "event"), Account(1010, {"coin": 9.0}, 1000, 1, dropped, 3, 1500)
    )
    put_account(change, ("EWR", 5, "label"), Account(4, {"coin": 9.0}, 4))
    db.commit(change, db.meta(), {})
    yield tmp_path
    db.close()


def test_the_accounts_are_read_from_a_home_beside_the_learner_that_runs(learner, home):
    done = learner("status", "--home", home, "--json")

    found = json.loads(done.stdout)
    assert found["balanced"] is True
    assert found["totals"] == {
        "mark": 1014,
        "archived": 1004,
        "quarantined": 1,
        "dropped": 9,
        "under_way": 490,
    }
    assert found["lanes"][0] == {
        "device": "EWR",
        "epoch": 5,
        "class": "event",
        "mark": 1010,
        "archived": 1000,
        "quarantined": 1,
        "dropped": {"dropped": 7, "sampled_out": 2},
        "durable": 1500,
        "under_way": 490,
        "prior": 3,
    }
    assert [lane["class"] for lane in found["lanes"]] == ["event", "label"]


def test_the_accounts_are_a_table_for_people(learner, home):
    lines = learner("status", "--home", home).stdout.splitlines()

    named = ["device", "epoch", "class", "mark", "archived", "quarantined", "dropped"]
    assert lines[0].split() == [*named, "under", "way"]
    assert lines[1].split("  ")[0] == "EWR"
    assert "dropped 7, sampled_out 2" in lines[1]
    assert lines[-2].split() == ["all", "1,014", "1,004", "1", "9", "490"]
    assert lines[-1] == "balanced"


def test_accounts_of_what_is_no_home_are_an_error(learner, tmp_path):
    assert learner("status", "--home", tmp_path).exit_code == 2


def guarded(capsys, error):
    """The exit code and what was said when a command raises `error`."""

    def fail():
        raise error

    with pytest.raises(SystemExit) as caught:
        _guarded(fail)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad_family", "said"), 2),
        (TransportError("unreachable", "said"), 4),
        (CapacityError("disk_full", "said"), 1),
        (PermissionError(13, "said"), 1),
    ],
)
def test_an_error_out_of_a_task_is_said_as_clearly_as_any_other(capsys, error, code):
    alone = guarded(capsys, error)

    assert alone == guarded(capsys, ExceptionGroup("a", [ExceptionGroup("b", [error])]))
    assert alone[0] == code
    assert "error: " in alone[1]
    assert "said" in alone[1]


def test_a_defect_is_no_interrupt():
    def fail():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        _guarded(fail)


def test_a_defect_among_the_errors_keeps_its_traceback():
    def fail():
        raise ExceptionGroup("tasks", [ConfigError("a", "b"), ZeroDivisionError()])

    with pytest.raises(ExceptionGroup):
        _guarded(fail)
