"""Tensors as bytes: each datatype goes there and back; no shape is believed without its bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.api import raw
from edge_runtime.api.frames import RawTensor
from edge_runtime.errors import RequestError
from edge_runtime.inference.tensors import DTYPES

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(st.sampled_from(sorted(set(DTYPES) - {"BYTES"})), SHAPES, st.randoms(use_true_random=False))
def test_numbers_go_there_and_back_bit_for_bit(datatype, shape, chance):
    size = int(np.prod(shape)) * DTYPES[datatype].itemsize
    array = np.frombuffer(chance.randbytes(size), DTYPES[datatype]).reshape(shape)
    if datatype == "BOOL":
        array = array.view("u1") > 127

    tensor = raw.raw_of("x", array)
    found = raw.array_of(tensor)

    assert (tensor.datatype, tensor.shape) == (datatype, shape)
    assert (found.dtype, found.shape) == (array.dtype, shape)
    assert found.tobytes() == array.tobytes()


@given(st.lists(st.text(), max_size=6))
def test_texts_go_there_and_back(texts):
    tensor = raw.raw_of("x", np.array([*texts, None], dtype=object)[:-1])

    assert tensor.datatype == "BYTES"
    assert raw.array_of(tensor).tolist() == texts


def test_bytes_are_texts_too():
    assert raw.packed(np.array([b"a", b"bc"])) == b"\1\0\0\0a\2\0\0\0bc"


@pytest.mark.parametrize("cell", [None, 1, "\ud800"])
def test_a_cell_that_is_no_text_is_refused(cell):
    with pytest.raises(RequestError, match="wrong_type"):
        raw.raw_of("x", np.array([cell], dtype=object))


def test_any_byte_but_zero_is_true():
    assert raw.unpacked("BOOL", (3,), b"\0\1\7").tolist() == [False, True, True]
    assert raw.unpacked("BOOL", (3,), b"\0\1\7").tobytes() == b"\0\1\1"


def test_a_column_of_rows_is_laid_out_by_rows():
    columns = np.asfortranarray(np.arange(6, dtype="<i4").reshape(2, 3))

    assert raw.packed(columns) == np.arange(6, dtype="<i4").tobytes()


def test_big_endian_arrays_are_refused_by_name():
    with pytest.raises(RequestError, match="wrong_type"):
        raw.raw_of("x", np.arange(3, dtype=">i4"))


@given(SHAPES, st.integers(1, 5))
def test_many_at_once_are_what_each_is_alone(shape, count):
    arrays = [np.full(shape, number, "<f4") for number in range(count)]
    tensors = [raw.raw_of("x", array) for array in arrays]

    for found, array in zip(raw.arrays_of(tensors), arrays, strict=True):
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, array, strict=True)


def test_as_many_dimensions_as_numpy_has_are_read_one_by_one():
    tensor = RawTensor("x", "FP32", (1,) * 64, b"1234")

    assert [each.shape for each in raw.arrays_of([tensor, tensor])] == [(1,) * 64] * 2


@given(
    st.sampled_from([*sorted(DTYPES), "", "FP31"]),
    st.lists(st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(-1, 3), max_size=5).map(tuple),
    st.binary(max_size=64),
)
def test_what_does_not_fit_is_refused(datatype, shape, data):
    """A read that succeeds gives the very shape and bytes that came."""
    tensor = RawTensor("x", datatype, shape, data)
    try:
        found = raw.array_of(tensor)
    except RequestError:
        with pytest.raises(RequestError, match="bad_tensor"):
            raw.arrays_of([tensor, tensor])
    else:
        assert found.shape == shape
        assert datatype == "BOOL" or raw.packed(found) == data
