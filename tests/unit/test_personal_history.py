"""A session's own history: the last rows, in order, within few bytes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edge_runtime.personal.history import BYTES_MAX, ROWS_MAX, History


def filled(columns: int, count: int) -> History:
    history = History(columns)
    for number in range(count):
        history.add(np.full(columns, number, np.float32), number / 10)
    return history


@pytest.mark.parametrize("columns", [0, 1, 16, 100, 1000, 1022, 1023, 5000])
def test_however_many_columns_the_bytes_are_bounded(columns):
    history = filled(columns, 100)

    assert history.nbytes <= BYTES_MAX
    assert len(history) <= ROWS_MAX
    assert (len(history) > 0) == (0 < columns <= 1022)


@pytest.mark.parametrize("count", [0, 1, ROWS_MAX, ROWS_MAX + 1, 5 * ROWS_MAX - 3])
def test_the_last_rows_come_out_in_order(count):
    rows, labels = filled(3, count).ordered()
    last = range(max(0, count - ROWS_MAX), count)

    assert rows.tolist() == [[number] * 3 for number in last]
    assert labels.tolist() == [number / 10 for number in last]


def test_it_comes_back_from_bytes():
    history = filled(3, ROWS_MAX + 7)
    again = History.of(history.keep())

    assert again.keep() == history.keep()
    again.clear()
    assert len(again) == 0


@pytest.mark.parametrize("change", [{"columns": -1}, {"columns": 10**9}, {"columns": 7}])
def test_a_history_that_fits_no_bounds_is_refused(change):
    kept = msgspec.structs.replace(filled(3, 5).keep(), **change)

    with pytest.raises(ValueError, match=r"history|reshape"):
        History.of(kept)
