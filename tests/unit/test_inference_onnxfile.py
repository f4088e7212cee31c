"""The metadata of an ONNX file, read without loading it: as onnx writes it, and out of garbage."""

from __future__ import annotations

import random

import pytest
from onnx import ModelProto, StringStringEntryProto

from edge_runtime.errors import PackageError
from edge_runtime.inference.onnxfile import family_of, is_package, metadata_in
from edge_runtime.inference.runner import Runner


def code(call, *arguments):
    with pytest.raises(PackageError) as caught:
        call(*arguments)
    return caught.value.code


def test_it_reads_what_the_loaded_model_says(write_package):
    path, _ = write_package()
    assert metadata_in(path) == Runner(path).metadata
    assert is_package(metadata_in(path))
    assert family_of(path) == "toy"


def test_it_reads_any_text_and_all_pairs(tmp_path):
    pairs = {"a": "", "": "empty key", "zwölf": "☃" * 1000, "headwaterx": "no prefix of ours"}
    model = ModelProto(ir_version=9, doc_string="x" * 300)
    model.metadata_props.extend(StringStringEntryProto(key=k, value=v) for k, v in pairs.items())
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert metadata_in(path) == pairs
    assert not is_package(pairs)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("credit.onnx", "credit"),
        ("My Model v2.1.onnx", "My-Model-v2-1"),
        ("--x--.onnx", "x"),
        ("ü☃.onnx", "model"),
        (f"{'a' * 70}.onnx", "a" * 64),
        (f"{'a' * 63} b.onnx", "a" * 63 + "-"),
    ],
)
def test_a_bare_file_is_of_the_family_of_its_name(tmp_path, name, family):
    (tmp_path / name).write_bytes(ModelProto(ir_version=9).SerializeToString())
    assert family_of(tmp_path / name) == family


def test_what_cannot_be_read_is_named(tmp_path):
    assert code(metadata_in, tmp_path / "absent.onnx") == "unreadable_package"
    assert code(metadata_in, tmp_path) == "unreadable_package"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 20,  # a number without an end
        b"\x0b",  # a group, which onnx does not use
        b"\x72\x7f",  # metadata, 127 bytes of it, and none there
        b"\x72\x04\x0a\x02\xff\xfe",  # a key that is no UTF-8
        b"\x72\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a length of exabytes
        b"\x80",
    ],
    ids=repr,
)
def test_garbage_is_named(tmp_path, data):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    assert code(metadata_in, path) == "unreadable_package"


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_cut_or_flipped_it_reads_or_is_named(write_package, seed):
    path, _ = write_package()
    whole, chance = path.read_bytes(), random.Random(seed)
    named = 0
    for _ in range(100):
        damaged = bytearray(whole[: chance.randrange(len(whole) + 1)])
        for _ in range(chance.randrange(4)):
            if damaged:
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            metadata_in(path)
        except PackageError as error:
            named += error.code == "unreadable_package"
    assert named > 10, f"seed {seed}"


def test_of_a_file_far_larger_than_memory_only_the_metadata_is_read(tmp_path):
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(200 << 30)  # a hole: it takes no space

    with pytest.raises(PackageError) as caught:
        metadata_in(path)

    assert caught.value.code == "unreadable_package"
