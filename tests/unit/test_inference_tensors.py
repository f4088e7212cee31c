"""Tensors: what fits a model is let through as it is, and what does not is named."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.errors import RequestError
from edge_runtime.inference.tensors import DTYPES, Tensor, datatype_of, fitting, selected

ROWS = Tensor("x", "FP32", (-1, 3))
COUNT = Tensor("count", "INT64", ())
PAIR = Tensor("pair", "FP64", (2, -1))
WORDS = Tensor("words", "BYTES", (-1,))


def floats(*shape):
    return np.zeros(shape, np.float32)


def refusal(declared, arrays):
    with pytest.raises(RequestError) as caught:
        fitting(declared, arrays)
    return caught.value


@pytest.mark.parametrize("datatype", DTYPES)
def test_an_array_of_the_declared_type_passes_untouched(datatype):
    array = np.full((2, 3), "" if datatype == "BYTES" else 0, DTYPES[datatype])
    fed = fitting([Tensor("x", datatype, (-1, 3))], {"x": array})
    assert fed["x"] is array
    assert datatype_of(array) == datatype


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name != "BYTES"])
def test_an_array_of_any_other_type_is_refused(datatype):
    for other in set(DTYPES) - {datatype}:
        error = refusal([Tensor("x", datatype, (-1,))], {"x": np.zeros(2, DTYPES[other])})
        assert error.code == "wrong_type"
        assert f"'x' is {other}; the model takes {datatype}" in error.message


def test_a_mapped_file_is_an_array_too(tmp_path):
    mapped = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(2, 3))
    assert fitting([ROWS], {"x": mapped})["x"] is mapped


@pytest.mark.parametrize(
    "value",
    [[[1.0, 2.0, 3.0]], 1.0, "text", None, np.float32(1), np.zeros((1, 3), ">f4"), b"\0" * 12],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_such_array_is_refused(value):
    assert refusal([ROWS], {"x": value}).code in {"wrong_type", "missing_input"}


def test_texts_may_be_objects_or_of_fixed_width():
    for words in (np.array(["a", "longer"], object), np.array(["a", "longer"])):
        assert fitting([WORDS], {"words": words})["words"] is words


@pytest.mark.parametrize(
    "words",
    [np.array([b"a", b"bc"]), *(np.array(["a", cell], object) for cell in (b"bc", None, 3, {}))],
    ids=repr,
)
def test_what_is_no_text_is_refused_before_it_is_taken_for_one(words):
    assert refusal([WORDS], {"words": words}).code == "wrong_type"


@pytest.mark.parametrize("shape", [(1, 3), (7, 3)])
def test_a_free_dimension_may_have_any_length(shape):
    assert fitting([ROWS], {"x": floats(*shape)})


@pytest.mark.parametrize("shape", [(), (3,), (1, 2), (1, 4), (1, 3, 1)])
def test_a_wrong_shape_is_named_with_the_right_one(shape):
    error = refusal([ROWS], {"x": floats(*shape)})
    assert error.code == "wrong_shape"
    assert str(list(shape)) in error.message
    assert "[-1, 3]" in error.message


@pytest.mark.parametrize("shape", [(1,), (0,), (2, 2)])
def test_a_scalar_takes_no_rows(shape):
    assert fitting([COUNT], {"count": np.array(3)})
    assert refusal([COUNT], {"count": np.zeros(shape, np.int64)}).code == "wrong_shape"


def test_a_first_dimension_may_be_fixed_and_a_later_one_free():
    assert fitting([PAIR], {"pair": np.zeros((2, 9))})
    assert refusal([PAIR], {"pair": np.zeros((1, 9))}).code == "wrong_shape"


def test_a_batch_without_rows_asks_for_nothing():
    error = refusal([ROWS], {"x": floats(0, 3)})
    assert (error.code, "'x'" in error.message) == ("empty_batch", True)


def test_a_missing_input_is_named_with_what_it_takes():
    error = refusal([ROWS, COUNT], {"x": floats(1, 3)})
    assert (error.code, error.hint) == ("missing_input", "it takes INT64 []")
    assert "'count'" in error.message


def test_an_unknown_input_is_named_with_the_nearest_known_one():
    error = refusal([ROWS, COUNT], {"x": floats(1, 3), "count": np.array(1), "cuont": np.array(1)})
    assert (error.code, error.hint) == ("unknown_input", "did you mean 'count'?")
    assert "'cuont'" in error.message
    far = refusal([ROWS], {"x": floats(1, 3), "zzz": np.array(1)})
    assert (far.code, far.hint) == ("unknown_input", "known: x")


def test_all_outputs_are_given_in_order_unless_some_are_named():
    assert selected([ROWS, COUNT], ()) == ["x", "count"]
    assert selected([ROWS, COUNT], ["count"]) == ["count"]
    with pytest.raises(RequestError) as caught:
        selected([ROWS, COUNT], ["count", "cout"])
    assert (caught.value.code, caught.value.hint) == ("unknown_output", "did you mean 'count'?")


@pytest.mark.parametrize("datatype", DTYPES)
def test_a_sample_fits_and_its_rows_are_not_all_alike(datatype):
    for shape in ((-1, 3), (-1,), (2, -1), (), (4,)):
        tensor = Tensor("x", datatype, shape)
        assert fitting([tensor], {"x": tensor.sample(3)})
    three = Tensor("x", datatype, (-1, 2)).sample(3)
    if datatype != "BYTES":
        assert len({row.tobytes() for row in three}) > 1


def test_only_a_free_first_dimension_makes_rows():
    shapes = [(-1, 3), (-1,), (), (2, -1), (1, 3)]
    assert [Tensor("x", "FP32", each).has_rows for each in shapes] == [True, True] + [False] * 3


def test_a_type_that_the_protocol_lacks_has_no_name():
    names = [datatype_of(np.zeros(1, kind)) for kind in ("c8", "M8[s]", ">f4", "V3")]
    assert names == [""] * 4
