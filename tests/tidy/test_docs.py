"""The documents keep up with the code: links, commands, configuration keys, decision records."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "proto/*.md", "models/**/*.md")
    for path in ROOT.glob(pattern)
)
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
CONFIGURED = {
    "edge_runtime/config.py": (
        *(
            "LogConfig",
            "HttpConfig",
            "InferenceConfig",
            "LoggingConfig",
            "UplinkConfig",
            "EdgeConfig",
            "BrokerConfig",
            "RolloutConfig",
            "SessionsConfig",
        ),
    ),
    "edge_runtime/features/feature.py": (
        *("Feature", "Window", "Lookup", "Cycle", "Standardise", "StaticTable"),
    ),
    "cloud_learner/train/declaration.py": (
        *("EventKind", "Label", "Learning", "Fast", "Stable", "Scratch", "Distilled", "Drift"),
        *("Gates", "Rollout", "Personal", "Package", "ArchiveConfig", "FamilyConfig"),
    ),
    "cloud_learner/stats/tasks.py": ("Task",),
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    local = [link for link in links if "://" not in link]

    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_make_targets_that_are_named_exist(path):
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", path.read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_source_files_that_are_named_exist(path):
    pattern = r"`((?:edge_runtime|cloud_learner|tests|tools|proto)/[\w./-]+\w)`"

    named = set(re.findall(pattern, path.read_text()))

    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_commands_that_are_named_exist(path):
    pattern = r"(?:^    |`)(edge-runtime|cloud-learner) ([a-z-]+)"

    named = set(re.findall(pattern, path.read_text(), re.MULTILINE))

    assert [
        f"{program} {command}"
        for program, command in sorted(named)
        if command not in commands_of(program.replace("-", "_"))
    ] == []


def commands_of(package: str) -> set[str]:
    """The functions that a package's click group registers, read from its source."""
    return {
        node.name.replace("_", "-")
        for path in (ROOT / package).glob("*.py")
        if path.stem in {"cli", "commands", "rollouts"}
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(re.search("command|group", ast.unparse(each)) for each in node.decorator_list)
    }


def fields_of(path: str, name: str) -> list[str]:
    """The annotated fields of a class, read from its source."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
    raise AssertionError(f"{path} has no class {name}")


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, names in CONFIGURED.items() for name in names]
)
def test_every_configuration_key_is_documented(path, name):
    text = (ROOT / "docs/configuration.md").read_text()
    sections = set(fields_of("cloud_learner/train/declaration.py", "FamilyConfig"))
    sections |= {"broker", "log", "http", "inference", "logging", "uplink", "sessions"}
    fields = fields_of(path, name)

    assert fields
    missing = [
        field
        for field in fields
        if field != "package"  # of EdgeConfig: local mode's, no key of the file
        and not re.search(rf"^\| `(?:[\w.<>]+\.)?{field}`", text, re.MULTILINE)
        and not (field in sections and f"`{field}." in text)
        and f".{field}." not in text  # a table within a table
    ]
    assert missing == []


def test_decision_records_are_numbered_and_have_a_status():
    records = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))

    assert [path.name[:4] for path in records] == [f"{n:04}" for n in range(1, len(records) + 1)]
    for path in records:
        text = path.read_text()
        assert text.startswith(f"# {path.name[:4]}: "), path.name
        assert re.search(r"^- Status: (proposed|accepted|superseded by \d{4})$", text, re.MULTILINE)
        assert re.search(r"^- Date: \d{4}-\d\d-\d\d$", text, re.MULTILINE)
