"""The house is in order: docstrings, sizes, rooms, words, and a README map that equals the tree."""

from __future__ import annotations

import ast
import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("edge_runtime", "cloud_learner")
FILE_LINES_MAX = 300
FUNCTION_LINES_MAX = 60

# A ratchet: what is longer today may shrink and may not grow; at most five entries.
LONGER_FILES: dict[str, int] = {}

# Each word with the reason; a file that must speak of one is named beside it.
FORBIDDEN = {
    "/wo" + "rk/": ("a path of one machine", ()),
    "/ro" + "ot/": ("a path of one machine", ()),
    "py" + "pi.org": ("pip knows its own index", ()),
    "download.py" + "torch.org": ("the user chooses the index", ("tools/setup", "README.md")),
    "FIX" + "ME": ("do it, or file it", ()),
    "TO" + "DO": ("do it, or file it", ()),
    "XX" + "X": ("do it, or file it", ()),
}
TEXT = {".py", ".md", ".toml", ".yaml", ".json", ".sh", ""}
UNSEEN = {".git", ".venv", "var", "dist", "__pycache__", ".hypothesis"}


def files(*folders: str) -> list[Path]:
    """The files below `folders`, but for caches and what the programs write."""
    found = []
    for folder in folders:
        for where, inner, names in os.walk(ROOT / folder):
            inner[:] = [name for name in inner if name not in UNSEEN and "_cache" not in name]
            found += [Path(where) / name for name in names]
    return sorted(found)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_sources() -> list[Path]:
    """All Python of the product: packages, families and tools without an extension."""
    tools = [path for path in files("tools") if "python" in path.read_text().split("\n", 1)[0]]
    return [path for path in files(*PACKAGES, "models") if path.suffix == ".py"] + tools


def everything(found: Iterator[str] | list[str]) -> None:
    """Fail with every sentence that was found, one a line."""
    sentences = list(found)
    assert not sentences, "\n" + "\n".join(sentences)


def test_every_module_says_what_it_is():
    everything(
        f"{name_of(path)}: no module docstring"
        for path in python_sources()
        if not ast.get_docstring(ast.parse(path.read_text()))
    )


def test_every_public_name_has_a_docstring():
    trees = {path: ast.parse(path.read_text()) for path in files(*PACKAGES) if path.suffix == ".py"}
    exempt = interface_methods(trees.values())
    everything(
        f"{name_of(path)}:{node.lineno}: {node.name} has no docstring"
        for path, tree in trees.items()
        for node in public_definitions(tree, exempt)
        if not ast.get_docstring(node)
    )


def test_a_missing_docstring_would_be_seen():
    tree = ast.parse("class A:\n    def b(self): ...\n    def c(self): ...\ndef d(): ...")

    assert [node.name for node in public_definitions(tree, {"c"})] == ["A", "b", "d"]


def interface_methods(trees) -> set[str]:
    """Methods of documented interfaces: an implementation needs no second docstring."""
    names = set(dir(asyncio.BufferedProtocol)) | set(dir(asyncio.Protocol))
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and ast.get_docstring(node) and is_protocol(node):
                names |= {item.name for item in node.body if is_function(item)}
    return names


def is_protocol(node: ast.ClassDef) -> bool:
    return any("Protocol" in ast.unparse(base) for base in node.bases)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def public_definitions(tree: ast.AST, exempt: set[str]) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (is_function(node) or isinstance(node, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield node
            yield from public_definitions(node, exempt)
        elif isinstance(tree, ast.Module) or node.name not in exempt:
            yield node


def test_files_keep_to_their_size():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in python_sources()}
    everything(
        f"{name}: {length} lines; at most {LONGER_FILES.get(name, FILE_LINES_MAX)}"
        for name, length in lengths.items()
        if length > LONGER_FILES.get(name, FILE_LINES_MAX)
    )


def test_the_ratchet_only_tightens():
    everything(
        f"{name}: has {length} lines now; lower or remove its entry in LONGER_FILES"
        for name, allowed in LONGER_FILES.items()
        if (length := len((ROOT / name).read_text().splitlines())) < allowed
    )
    assert len(LONGER_FILES) <= 5


def test_functions_keep_to_their_size():
    everything(
        f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines; "
        f"at most {FUNCTION_LINES_MAX}"
        for path in python_sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if is_function(node) and (length := node.end_lineno - node.lineno + 1) > FUNCTION_LINES_MAX
    )


def rooms() -> list[Path]:
    return sorted({path.parent for path in files(*PACKAGES)} - {ROOT / name for name in PACKAGES})


def test_no_room_holds_one_file_and_none_holds_a_room():
    everything(
        f"{name_of(room)}: a room of {len(modules)} files"
        for room in rooms()
        if len(modules := [path for path in room.glob("*.py") if path.stem != "__init__"]) < 2
    )
    everything(f"{name_of(room)}: a room in a room" for room in rooms() if room.parents[1] != ROOT)


def test_the_init_of_a_room_holds_a_docstring_only():
    everything(
        f"{name_of(room)}/__init__.py: not just a docstring"
        for room in rooms()
        if not is_docstring_only(room / "__init__.py")
    )


def is_docstring_only(path: Path) -> bool:
    body = ast.parse(path.read_text()).body if path.exists() else []
    return (
        len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    )


@pytest.mark.parametrize("folder", ["proto", "models", "tools", "tests"])
def test_what_is_no_package_has_no_init(folder):
    everything(name_of(path) for path in files(folder) if path.name == "__init__.py")


def test_no_file_holds_a_forbidden_word():
    texts = {name_of(path): path.read_text() for path in files(".") if path.suffix in TEXT}
    everything(
        f"{name}: {word!r}: {reason}"
        for name, text in texts.items()
        for word, (reason, allowed) in FORBIDDEN.items()
        if word in text and name not in allowed
    )


def test_the_changelog_names_a_version_or_what_comes_next():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert headings
    everything(
        f"{heading!r}: neither Unreleased nor a version"
        for heading in headings
        if heading != "Unreleased" and not re.fullmatch(r"\d+\.\d+\.\d+", heading)
    )


def mapped() -> set[str]:
    """What the README's file map names: the first word of each line in its block."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^## File map\n.*?^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no block ```text below '## File map'"
    return {line.split()[0] for line in block[1].splitlines() if line.strip()}


def standing() -> set[str]:
    """The tree as the map shows it: files, but test and schema folders as one line each."""
    folders = ("tests", "proto/schemas", "proto/vectors")
    names = {name_of(path) for path in files(".") if path.name != "__init__.py"}
    names |= {f"{package}/__init__.py" for package in PACKAGES}
    return {shortened(name, folders) for name in names if name != ".gitignore"}


def shortened(name: str, folders: tuple[str, ...]) -> str:
    parts = name.split("/")
    if name.startswith("tests/"):
        return f"{'/'.join(parts[:2])}/" if len(parts) > 2 else name
    return next((f"{folder}/" for folder in folders if name.startswith(f"{folder}/")), name)


def test_the_file_map_of_the_readme_equals_the_tree():
    missing = [f"missing in README.md: {name}" for name in sorted(standing() - mapped())]
    stale = [f"in README.md, not in the tree: {name}" for name in sorted(mapped() - standing())]
    everything(missing + stale)
