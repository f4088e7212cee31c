"""Files that `tuf-client` brings: by signed length and hash alone, once, and never half."""

from __future__ import annotations

from posixpath import normpath
from urllib.parse import quote, unquote

import pytest
from tuf.api.metadata import TargetFile

PATH = "folder/of a/file.txt"


def served(repository, target: TargetFile) -> list[str]:
    """The addresses below which a target is served."""
    return [each for each in repository.files if any(h in each for h in target.hashes.values())]


@pytest.mark.parametrize("path", ["file.txt", "path/to/a/file.txt", PATH, "../up", "a%20b", "?#"])
def test_a_file_arrives_under_a_name_of_its_own(repository, device, path):
    target = repository.add_target(path, b"content")
    for address in served(repository, target):
        repository.files[quote(normpath(unquote(address)))] = b"content"  # as HTTP writes it
    repository.publish_all()
    assert device.refresh() == 0
    assert device.held() == []
    assert device.download(path) == 0
    assert device.held() == [b"content"]
    assert [each.parent for each in device.targets.rglob("*")] == [device.targets]
    assert not (device.targets.parent / "up").exists()


def test_a_file_that_is_there_is_not_asked_for_again(repository, device):
    repository.add_target("one", b"one")
    repository.add_target("two", b"two", hashes=["sha512"])
    repository.publish_all()
    assert device.download("one", "two") == 0
    repository.asked.clear()
    assert device.download("one", "two") == 0
    assert repository.asked == ["/metadata/2.root", "/metadata/timestamp"]
    assert device.held() == [b"one", b"two"]


def test_other_content_at_the_same_address_is_refused(repository, device):
    first = repository.add_target("first", b"first")
    second = repository.add_target("second", b"second")
    repository.publish_all()
    assert device.download("first") == 0
    for address in served(repository, first) + served(repository, second):
        repository.files[address] = b"malice"
    assert device.download("first") == 0
    assert device.download("second") == 1
    assert "hash_mismatch" in device.said
    assert device.held() == [b"first"]


@pytest.mark.parametrize("bad", [b"", b"conten", b"content and more", b"contenT", b"x" * 5_000_000])
def test_cut_long_and_changed_files_leave_nothing_behind(repository, device, bad):
    target = repository.add_target("file", b"content")
    repository.publish_all()
    [address] = served(repository, target)
    repository.files[address] = bad
    assert device.download("file") == 1
    assert device.held() == []
    assert [
        each for each in (device.metadata / ".device" / "shelf").rglob("*") if each.is_file()
    ] == []
    repository.files[address] = b"content"
    assert device.download("file") == 0
    assert device.held() == [b"content"]


def test_newer_content_takes_the_place_of_older_and_forged_of_none(repository, device):
    repository.add_target("file", b"content")
    repository.publish_all()
    assert device.download("file") == 0
    content, others = b"content", []
    for number in range(3):
        repository.publish_all()
        content = b"newer content %d" % number
        target = repository.add_target("file", content)
        repository.add_target(f"other-{number}", b"other %d" % number)
        repository.publish_all()
        assert device.download("file") == 0
        assert device.held() == [*others, content]
        assert device.download(f"other-{number}") == 0
        held = [*others, content, b"other %d" % number]
        others.append(b"other %d" % number)
        for address in served(repository, target):
            repository.files[address] = b"malice"
        repository.publish_all()
        assert device.download("file") == 0
        assert device.held() == held


@pytest.mark.parametrize(
    "hashes", [["sha256"], ["sha512"], ["sha256", "sha512"], ["sha512", "sha256"]]
)
def test_each_usual_hash_will_do_and_all_that_are_signed_bind(repository, device, hashes):
    repository.add_target("file", b"content", hashes=hashes)
    forged = repository.add_target("forged", b"forged", hashes=hashes)
    forged.hashes[hashes[-1]] = "ab" * (32 if hashes[-1] == "sha256" else 64)
    repository.files |= {f"/targets/{each}.forged": b"forged" for each in forged.hashes.values()}
    repository.publish_all()
    assert device.download("file") == 0
    assert device.download("forged") == 1
    assert device.held() == [b"content"]


def test_a_hash_that_nobody_knows_is_no_proof(repository, device):
    target = repository.add_target("file", b"content")
    target.hashes["unknown"] = target.hashes.pop("sha256")
    repository.publish_all()
    assert device.download("file") == 1
    assert device.held() == []


def test_a_repository_without_consistent_snapshots_has_plain_names(repository, device):
    repository.root.consistent_snapshot = False
    repository.add_target("file", b"content")
    repository.publish_all("root")
    for role in ("snapshot", "targets"):
        repository.files[f"/metadata/{role}.json"] = repository.file(role)
    repository.files["/targets/file"] = b"content"
    assert device.download("file") == 0
    assert device.held() == [b"content"]


def test_a_file_that_the_server_lacks_is_no_success(repository, device):
    target = repository.add_target("file", b"content")
    repository.publish_all()
    [address] = served(repository, target)
    del repository.files[address]
    assert device.download("file") == 1
    assert device.held() == []
