"""The metadata of an ONNX file, read without loading it: as onnx writes it, and out of garbage."""

from __future__ import annotations

import contextlib
import random

import pytest
from onnx import ModelProto, StringStringEntryProto, TensorProto, helper

from edge_runtime.errors import PackageError
from edge_runtime.inference.onnxfile import check_whole, family_of, is_package, metadata_in
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


def external(tensor):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "there.bin", "offset": "0", "length": "4"}.items():
        tensor.external_data.add(key=key, value=value)


def a_graph(name="g"):
    return helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], name, [], [])


def in_the_weights(model):
    return model.graph.initializer.add(name="w")


def in_a_constant(model):
    attribute = model.graph.node.add(op_type="Constant").attribute.add(name="value")
    return attribute.t


def in_a_list_of_an_attribute(model):
    return model.graph.node.add(op_type="X").attribute.add(name="values").tensors.add()


def in_sparse_weights(model):
    return model.graph.sparse_initializer.add().values


def in_indices_of_an_attribute(model):
    return model.graph.node.add(op_type="X").attribute.add(name="v").sparse_tensor.indices


def in_an_inner_graph(model):
    attribute = model.graph.node.add(op_type="If").attribute.add(name="then_branch")
    attribute.g.CopyFrom(a_graph())
    inner = attribute.g.node.add(op_type="Loop").attribute.add(name="body")
    inner.graphs.append(a_graph())
    return inner.graphs[0].initializer.add(name="deep")


def in_a_function(model):
    node = model.functions.add(name="f", domain="d").node.add(op_type="Constant")
    return node.attribute.add(name="value").t


def in_what_trains(model):
    return model.training_info.add().initialization.initializer.add(name="w")


@pytest.mark.parametrize(
    "place",
    [
        *(in_the_weights, in_a_constant, in_a_list_of_an_attribute, in_sparse_weights),
        *(in_indices_of_an_attribute, in_an_inner_graph, in_a_function, in_what_trains),
    ],
)
def test_weights_elsewhere_are_found_wherever_they_are_named(tmp_path, place):
    model = helper.make_model(a_graph())
    path = tmp_path / "m.onnx"
    tensor = place(model)
    tensor.raw_data = bytes(range(4)) * 1000
    path.write_bytes(model.SerializeToString())
    check_whole(path)
    external(tensor)
    path.write_bytes(model.SerializeToString())
    assert code(check_whole, path) == "external_data"


def test_a_good_package_is_whole(write_package):
    check_whole(write_package()[0])


def test_a_model_of_very_many_parts_is_still_read(tmp_path):
    model = helper.make_model(a_graph())
    for number in range(20_000):
        model.graph.node.add(op_type="Identity", input=[f"{number}"], output=[f"{number + 1}"])
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    check_whole(path)


@pytest.mark.parametrize("seed", range(5))
def test_garbage_is_refused_or_whole(tmp_path, write_package, seed):
    good, chance = write_package()[0].read_bytes(), random.Random(seed)
    path = tmp_path / "m.onnx"
    for _ in range(200):
        data = bytearray(good[: chance.randrange(1, len(good) + 1)])
        for _ in range(chance.randint(0, 4)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with contextlib.suppress(PackageError):
            check_whole(path)
