"""The page for newcomers is right: its files, as they stand there, make a release of every task."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloud_learner.cli import main
from cloud_learner.train.family import Family
from edge_runtime.cli import main as edge
from edge_runtime.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "models/README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NAMES = ("past.py", "cafe/family.toml", "cafe/features.toml", "cafe/network.py")
FILES = dict(zip(NAMES, [text for _, text in BLOCKS], strict=False))
COMMANDS = [
    shlex.split(line, comments=True)
    for language, text in BLOCKS
    if language == "sh"
    for line in text.splitlines()
]
LINES = {"binary": 8000, "multiclass": 8000}
"""Of the data file: some days are enough for these, and are learned in seconds."""

# What the page says in words of each task: the label, the fields of `ordered`, the outputs.
CHANGES = {
    "binary": {},
    "multiclass": {
        "past.py": ("int(minutes > 4)", "(minutes > 2) + (minutes > 5)"),
        "cafe/network.py": ("OUTPUTS = 1", "OUTPUTS = 3"),
    },
    "regression": {"past.py": ("int(minutes > 4)", "minutes")},
    "ranking": {
        "past.py": ("int(minutes > 4)", "minutes"),
        "cafe/family.toml": ('ahead = "int"', 'ahead = "int", hour = "str"'),
    },
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(task)` writes the files of the page for a task into a folder that becomes the cwd."""

    def files(task: str = "binary") -> None:
        monkeypatch.chdir(tmp_path)
        Path("cafe").mkdir()
        for name, text in FILES.items():
            old, new = CHANGES[task].get(name, ("", ""))
            assert old in text, f"{name} has no {old}"
            Path(name).write_text(text.replace(old, new, 1))
        with Path("cafe/family.toml").open("a") as family:
            family.write(task_of(task))

    return files


def task_of(task: str) -> str:
    """The block of the page that declares the task; a binary one needs none."""
    found = [text for _, text in BLOCKS if f'kind = "{task}"' in text]
    assert len(found) == (task != "binary")
    return "\n" + "".join(found)


def test_the_page_holds_the_files_that_it_speaks_of():
    for name, text in FILES.items():
        assert f"`{name}`" in PAGE
        assert ("[[features]]" in text) == (name == "cafe/features.toml")
    assert len(FILES["cafe/network.py"].splitlines()) <= 30


@pytest.mark.parametrize(
    "task",
    [
        "binary",
        "multiclass",
        *(pytest.param(t, marks=pytest.mark.slow) for t in ("regression", "ranking")),
    ],
)
def test_the_files_of_the_page_make_a_release(write, task):
    write(task)
    python, bootstrap = COMMANDS[:2]
    assert python == ["python", "past.py"]
    runpy.run_path(python[1], run_name="__main__")
    data = Path("past.csv")
    data.write_text("".join(data.read_text().splitlines(keepends=True)[: LINES.get(task)]))

    done = CliRunner().invoke(main, bootstrap[1:])

    assert done.exit_code == 0, done.output
    assert '"outcome": "pass"' in done.stdout
    assert "passed the gate" in done.stderr
    assert Path("var/cloud/families/cafe/origin.json").is_file()
    assert Path("var/cloud/trust/root.json").is_file()


def test_the_commands_of_the_page_take_the_options_that_it_gives(write):
    write()
    Path("past.csv").touch()
    programs = {"cloud-learner": main, "edge-runtime": edge}
    named = [words for words in COMMANDS if words[0] in programs]

    assert {words[1] for words in named} >= {"bootstrap", "serve", "admit", "init", "run"}
    for program, name, *options in named:
        command = programs[program].commands.get(name)
        if command is not None:
            command.make_context(name, options, resilient_parsing=False)


def test_errors_read_as_the_page_shows_them(write):
    write()
    for name, old, new in (
        ("cafe/family.toml", 'ahead = "int"', 'ahead = "integer"'),
        ("cafe/features.toml", "bounds = [0.0, 20.0]", "bounds = [20.0, 0.0]"),
        ("cafe/network.py", "def build_student", "def built_student"),
    ):
        path = Path(name)
        path.write_text(path.read_text().replace(old, new))

    with pytest.raises(ConfigError) as caught:
        Family.load(Path("cafe"))
    [shown] = [text for language, text in BLOCKS if language == "text"]
    assert caught.value.message == shown.strip()


def test_a_wrong_cell_reads_as_the_page_shows_it(write):
    write()
    runpy.run_path("past.py", run_name="__main__")
    lines = Path("past.csv").read_text().splitlines(keepends=True)
    at = next(at for at, line in enumerate(lines) if at > 800 and ",ordered," in line)
    lines[at] = re.sub(r",(espresso|filter|tea),\d,", r",\1,two,", lines[at])
    Path("past.csv").write_text("".join(lines))

    done = CliRunner().invoke(main, COMMANDS[1][1:])

    told = f"past.csv, row {at} (line {at + 1}): ahead 'two' is not a whole number"
    assert done.exit_code == 2
    assert told in done.stderr
    assert re.sub(r"\d+", "N", told) in re.sub(r"\d+", "N", PAGE)
