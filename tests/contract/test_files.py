"""One suite for every disk: the machine's own, and the one in memory that records."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from edge_runtime.files import OsFiles, write_atomic

TOOL = Path(__file__).parents[2] / "tools" / "crash_states.py"


def memory_files():
    spec = importlib.util.spec_from_file_location("crash_states", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MemoryFiles()


@pytest.fixture(params=[OsFiles, memory_files])
def files(request):
    return request.param()


@pytest.fixture
def home(files, tmp_path):
    files.close(files.own(tmp_path / "home"))
    return tmp_path / "home"


def content(files, path):
    with files.reader(path) as file:
        return file.read()


def make(files, path, data):
    fd = files.create(path)
    files.write(fd, data, 0)
    files.sync(fd)
    files.close(fd)


def test_what_is_written_is_read(files, home):
    fd = files.create(home / "a")
    files.write(fd, b"abc", 0)
    files.write(fd, b"XY", 2)
    files.write(fd, b"z", 6)
    files.sync(fd)
    files.close(fd)
    files.sync_directory(home)
    assert content(files, home / "a") == b"abXY\0\0z"
    assert (files.size(home / "a"), files.names(home), files.written) == (7, ["a"], 6)


def test_a_file_that_is_there_is_not_created(files, home):
    make(files, home / "a", b"kept")
    with pytest.raises(FileExistsError):
        files.create(home / "a")
    fd = files.open(home / "a")
    files.write(fd, b"K", 0)
    files.close(fd)
    assert content(files, home / "a") == b"Kept"


def test_space_is_allocated_as_zeros_and_given_back(files, home):
    fd = files.create(home / "a")
    files.write(fd, b"abc", 0)
    files.allocate(fd, 5)
    files.allocate(fd, 4)
    assert content(files, home / "a") == b"abc\0\0"
    files.truncate(fd, 2)
    files.close(fd)
    assert content(files, home / "a") == b"ab"


def test_a_file_replaces_another(files, home):
    make(files, home / "old", b"old")
    make(files, home / "new", b"new")
    with files.reader(home / "old") as file:
        files.replace(home / "new", home / "old")
        assert file.read() == b"old"
    assert (files.names(home), content(files, home / "old")) == (["old"], b"new")


def test_a_name_that_is_gone_is_not_found(files, home):
    make(files, home / "a", b"a")
    files.unlink(home / "a")
    files.unlink(home / "a")
    for ask in (files.reader, files.size, files.open):
        with pytest.raises(FileNotFoundError):
            ask(home / "a")
    assert files.names(home) == []


def test_a_directory_has_one_owner(files, home):
    fd = files.own(home)
    with pytest.raises(BlockingIOError):
        files.own(home)
    files.close(fd)
    files.close(files.own(home))


def test_a_file_is_replaced_in_one_commit_point(files, home):
    write_atomic(home / "a", b"first", 0o600, files)
    write_atomic(home / "a", b"second", 0o600, files)
    assert (files.names(home), content(files, home / "a")) == (["a"], b"second")
