"""The registry: bytes are found under their hash, or refused."""

from __future__ import annotations

import hashlib

import pytest

from cloud_learner.store.registry import Registry
from edge_runtime.errors import PackageError, RequestError


def test_what_was_put_is_found_under_its_hash(tmp_path):
    sha256 = Registry(tmp_path).put(b"package")
    assert sha256 == hashlib.sha256(b"package").hexdigest()
    assert Registry(tmp_path).path(sha256).read_bytes() == b"package"


def test_putting_the_same_bytes_again_changes_nothing(tmp_path):
    registry = Registry(tmp_path)
    first = registry.path(registry.put(b"package")).stat()
    second = registry.path(registry.put(b"package")).stat()
    assert (second.st_ino, second.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


@pytest.mark.parametrize("name", ["0" * 64, "", "../secret", "ABC"])
def test_an_unknown_hash_is_refused(tmp_path, name):
    with pytest.raises(RequestError) as caught:
        Registry(tmp_path).path(name)
    assert caught.value.code == "unknown_package"


def test_a_changed_file_is_refused_and_can_be_put_again(tmp_path):
    registry = Registry(tmp_path)
    sha256 = registry.put(b"package")
    registry.path(sha256).write_bytes(b"other")
    with pytest.raises(PackageError) as caught:
        registry.path(sha256)
    assert caught.value.code == "hash_mismatch"
    registry.put(b"package")
    assert registry.path(sha256).read_bytes() == b"package"
