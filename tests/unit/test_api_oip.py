"""The Open Inference Protocol: what a body asks, what is refused, what an answer looks like."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edge_runtime.api import oip
from edge_runtime.errors import RequestError
from edge_runtime.inference.tensors import DTYPES, Tensor

DECLARED = (Tensor("x", "FP32", (-1, 3)),)
FLOATS = np.array([[1.5, -2.25, 3.0]], dtype="<f4")


def tensor(datatype: str = "FP32", shape: Any = (1, 3), name: str = "x", **more: Any) -> Any:
    return {"name": name, "shape": list(shape), "datatype": datatype, **more}


def ask(*inputs: Any, **more: Any) -> oip.Question:
    return oip.question(json.dumps({"inputs": inputs, **more}).encode(), None, DECLARED)


def ask_binary(binary: bytes, *inputs: Any, **more: Any) -> oip.Question:
    text = json.dumps({"inputs": inputs, **more}).encode()
    return oip.question(text + binary, len(text), DECLARED)


def sized(size: int, datatype: str = "FP32", shape: Any = (1, 3), name: str = "x") -> Any:
    return tensor(datatype, shape, name, parameters={"binary_data_size": size})


LISTS = [
    ("BOOL", [True, False, True]),
    ("UINT8", [0, 255, 7]),
    ("UINT16", [0, 65535, 7]),
    ("UINT32", [0, 4294967295, 7]),
    ("UINT64", [0, 18446744073709551615, 7]),
    ("INT8", [-128, 127, 0]),
    ("INT16", [-32768, 32767, 0]),
    ("INT32", [-2147483648, 2147483647, 0]),
    ("INT64", [-9223372036854775808, 9223372036854775807, 0]),
    ("FP32", [1.5, -2, 1e-7]),
    ("FP64", [1.5, -2, 1e300]),
    ("BYTES", ["", "é", "two words"]),
]


@pytest.mark.parametrize(("datatype", "data"), LISTS)
def test_a_list_becomes_the_tensor_that_it_says(datatype: str, data: list[Any]) -> None:
    array = ask(tensor(datatype, data=data)).inputs["x"]

    assert (array.dtype, array.shape) == (DTYPES[datatype], (1, 3))
    assert array.tolist() == np.array([data], dtype=DTYPES[datatype]).tolist()


@pytest.mark.parametrize(("datatype", "data"), LISTS)
def test_lists_may_be_nested_as_the_shape_says(datatype: str, data: list[Any]) -> None:
    flat = ask(tensor(datatype, (3, 1, 1), data=data)).inputs["x"]
    nested = ask(tensor(datatype, (3, 1, 1), data=[[[each]] for each in data])).inputs["x"]

    assert nested.dtype == flat.dtype
    assert nested.tolist() == flat.tolist()


BINARY = [
    *((name, np.array([[1, 0, 7]], dtype=dtype)) for name, dtype in DTYPES.items() if dtype != "O"),
    ("BYTES", np.array([["", "é", "two words"]], dtype=object)),
]


@pytest.mark.parametrize(("datatype", "array"), BINARY)
def test_a_binary_tensor_comes_back_bit_for_bit(datatype: str, array: Any) -> None:
    asked = ask_binary(oip.packed(array), sized(len(oip.packed(array)), datatype))
    asked.binary = True

    text, blobs = oip.answer(asked, "f", "r", {"y": asked.inputs["x"]})

    assert json.loads(text)["outputs"] == [
        {
            "name": "y",
            "datatype": datatype,
            "shape": [1, 3],
            "parameters": {"binary_data_size": len(blobs[0])},
        }
    ]
    assert blobs == [oip.packed(array)]


def test_the_bytes_of_a_tensor_are_little_endian_and_texts_have_their_length_in_front() -> None:
    assert oip.packed(np.array([1, 258], dtype="<u2")) == b"\x01\x00\x02\x01"
    assert oip.packed(np.array(["é", ""], dtype=object)) == b"\x02\0\0\0\xc3\xa9\0\0\0\0"


def test_binary_tensors_follow_the_json_in_the_order_of_the_inputs() -> None:
    inputs = (
        sized(2, "UINT8", (2,), "a"),
        tensor("INT8", (1,), "b", data=[3]),
        sized(1, "BOOL", (1,), "c"),
    )
    asked = ask_binary(b"\x05\x06\x02", *inputs)

    assert {name: array.tolist() for name, array in asked.inputs.items()} == {
        "a": [5, 6],
        "b": [3],
        "c": [True],
    }


def test_id_deadline_and_outputs_are_taken_from_the_request() -> None:
    asked = ask(
        tensor(data=[1, 2, 3]),
        id="q-1",
        parameters={"timeout": 2500, "binary_data_output": True, "mood": "good"},
        outputs=[{"name": "b", "parameters": {"binary_data": False}}, {"name": "a"}],
    )

    assert (asked.id, asked.timeout_s, asked.outputs) == ("q-1", 0.0025, ["b", "a"])
    text, blobs = oip.answer(asked, "f", "r7", {"b": FLOATS, "a": FLOATS})
    answer = json.loads(text)
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("f", "r7", "q-1")
    assert answer["outputs"][0]["data"] == [1.5, -2.25, 3.0]
    assert answer["outputs"][1]["parameters"] == {"binary_data_size": 12}
    assert blobs == [FLOATS.tobytes()]


def test_without_an_id_none_is_made_up_and_a_timeout_of_0_is_none() -> None:
    asked = ask(tensor(data=[1, 2, 3]), parameters={"timeout": 0})

    assert asked.timeout_s is None
    assert "id" not in json.loads(oip.answer(asked, "f", "r", {"y": FLOATS})[0])


@pytest.mark.parametrize(
    ("declared", "body", "shape"),
    [
        (Tensor("x", "FP32", (-1, 3)), bytes(24), (2, 3)),
        (Tensor("x", "FP32", (2, 3)), bytes(24), (2, 3)),
        (Tensor("x", "INT8", (-1, -1)), bytes(5), (1, 5)),
        (Tensor("x", "BYTES", (-1,)), b"a text", (1,)),
    ],
)
def test_a_raw_body_is_the_one_tensor_of_its_model(
    declared: Tensor, body: bytes, shape: tuple[int, ...]
) -> None:
    asked = oip.question(body, 0, [declared])

    assert asked.inputs["x"].shape == shape
    assert asked.binary


REFUSED = [
    (ask, (tensor(data=[1, 2]),), "2 elements"),
    (ask, (tensor(data=[[1, 2], [3]]),), "not nested as its shape"),
    (ask, (tensor(data=[1, 2, "3"]),), "Expected float, got str"),
    (ask, (tensor(data=[1, 2, None]),), "Expected float, got null"),
    (ask, (tensor(data=[1, 2, True]),), "Expected float, got bool"),
    (ask, (tensor(data=[1, 2, 1e39]),), "<= 3.4"),
    (ask, (tensor(data=5),), "Expected array, got int"),
    (ask, (tensor("INT32", data=[1, 2, 3.5]),), "Expected int, got float"),
    (ask, (tensor("INT8", data=[1, 2, 128]),), "<= 127"),
    (ask, (tensor("UINT8", data=[1, 2, -1]),), ">= 0"),
    (ask, (tensor("UINT64", data=[1, 2, 1 << 64]),), "input 'x'"),
    (ask, (tensor("BYTES", data=[1, 2, 3]),), "Expected str, got int"),
    (ask, (tensor("FP16", data=[1, 2, 3]),), "send it as a binary tensor"),
    (ask, (tensor("BF16", data=[1, 2, 3]),), "Invalid enum value 'BF16'"),
    (ask, (tensor(shape=(-1, 3), data=[1, 2, 3]),), ">= 0"),
    (ask, (tensor(shape=(1,) * 33, data=[1]),), "length <= 32"),
    (ask, (tensor(),), "neither data nor binary_data_size"),
    (ask, (tensor(data=[1, 2, 3]), tensor(data=[1, 2, 3])), "the same name"),
    (ask, (sized(12),), "size 0 into shape"),
    (ask_binary, (bytes(13), sized(12)), "13 bytes follow the JSON; its inputs claim 12"),
    (ask_binary, (bytes(12), sized(16)), "its inputs claim 16"),
    (ask_binary, (bytes(12), sized(-1)), "binary_data_size is -1"),
    (ask_binary, (bytes(12), sized(True)), "binary_data_size is True"),
    (ask_binary, (bytes(12), tensor(data=[1, 2, 3])), "its inputs claim 0"),
    (ask_binary, (bytes(12), {**sized(12), "data": [1, 2, 3]}), "both data and"),
    (ask_binary, (b"\x09\0\0\0ab", sized(6, "BYTES", (1,))), "longer than its bytes"),
    (ask_binary, (b"\x01\0\0\0\xff", sized(5, "BYTES", (1,))), "utf-8"),
]


@pytest.mark.parametrize(("how", "arguments", "why"), REFUSED)
def test_what_is_no_tensor_is_refused_with_the_reason(how: Any, arguments: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        how(*arguments)
    assert caught.value.code == "bad_request"


@pytest.mark.parametrize(
    ("body", "json_bytes", "why"),
    [
        (b"", None, "truncated"),
        (b"[1]", None, "Expected object, got array"),
        (b'{"inputs": 5}', None, "Expected array, got int"),
        (b'{"id": "a"}', None, "missing required field inputs"),
        (b"\xff\xfe", None, "malformed"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}', None, "no NaN"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1e999]}]}', None, "range"),
        (b'{"inputs":' + b"[" * 100_000, None, "JSON cannot be read"),
        (b"{}", 3, "claims 3 bytes of JSON; the body has 2"),
        (b"{}", -1, "claims -1"),
        (bytes(13), 0, "multiple of element size"),
    ],
)
def test_what_is_no_request_is_refused_with_the_reason(
    body: bytes, json_bytes: int | None, why: str
) -> None:
    with pytest.raises(RequestError, match="(?s)" + why) as caught:
        oip.question(body, json_bytes, DECLARED)
    assert caught.value.code == "bad_request"


def test_a_raw_body_for_two_inputs_is_refused() -> None:
    with pytest.raises(RequestError, match="one input; this one has 2"):
        oip.question(bytes(12), 0, [*DECLARED, *DECLARED])


@pytest.mark.parametrize(
    "parameters",
    [
        {"sequence_id": 7},
        {"sequence_start": True},
        {"priority": 1},
        {"headers": {"a": "b"}},
        {"triton_enable_empty_final_response": True},
    ],
)
def test_reserved_parameters_that_are_not_built_are_refused(parameters: Any) -> None:
    with pytest.raises(RequestError, match=next(iter(parameters))) as caught:
        ask(tensor(data=[1, 2, 3]), parameters=parameters)
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    "more",
    [
        {"inputs": [tensor(parameters={"shared_memory_region": "a"})]},
        {"outputs": [{"name": "y", "parameters": {"classification": 2}}]},
        {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "a"}}]},
    ],
)
def test_extensions_that_are_not_built_are_refused(more: Any) -> None:
    body = {"inputs": [tensor(data=[1, 2, 3])]} | more
    with pytest.raises(RequestError) as caught:
        oip.question(json.dumps(body).encode(), None, DECLARED)
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize("parameters", [{"timeout": -1}, {"timeout": "1"}, {"timeout": True}])
def test_a_timeout_that_is_no_number_of_microseconds_is_refused(parameters: Any) -> None:
    with pytest.raises(RequestError, match="not a number of microseconds"):
        ask(tensor(data=[1, 2, 3]), parameters=parameters)


def test_a_flag_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(RequestError, match="binary_data_output is 1"):
        ask(tensor(data=[1, 2, 3]), parameters={"binary_data_output": 1})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_lacks_is_answered_in_binary_or_refused(value: float) -> None:
    outputs = {"y": np.array([[1.0, value]], dtype="<f4")}
    asked = ask(tensor(data=[1, 2, 3]))

    with pytest.raises(RequestError, match="NaN or infinity") as caught:
        oip.answer(asked, "f", "r", outputs)
    assert caught.value.code == "not_json"
    asked.binary = True
    assert oip.answer(asked, "f", "r", outputs)[1] == [outputs["y"].tobytes()]


def test_large_finite_numbers_are_no_infinity() -> None:
    outputs = {"y": np.array([1.7e308, 1.7e308])}

    text, _ = oip.answer(ask(tensor(data=[1, 2, 3])), "f", "r", outputs)

    assert json.loads(text)["outputs"][0]["data"] == [1.7e308, 1.7e308]
