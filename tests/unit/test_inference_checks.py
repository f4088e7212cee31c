"""The compiled check of an event and the judgement field by field say the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import RequestError
from edge_runtime.inference.checks import compiled, judge

WANTED = {"word": "str", "count": "int", 'it\'s "x"\n': "float"}
CHECK = compiled("kind", WANTED)

numbers = st.floats() | st.integers(-(2**70), 2**70) | st.sampled_from([2**63, -(2**63) - 1])
values = st.text(max_size=70) | numbers | st.booleans() | st.none() | st.just("\ud800")
good = st.fixed_dictionaries(
    {
        "word": st.text(max_size=70),
        "count": st.integers(-(2**63), 2**63 - 1),
        'it\'s "x"\n': st.floats(allow_nan=False, allow_infinity=False),
    }
)


def said(check, *event) -> str:
    try:
        check(*event)
    except RequestError as error:
        return str(error)
    return "taken"


@given(
    st.floats(0, 2e9) | values,
    good | st.dictionaries(st.sampled_from([*WANTED, "other"]), values),
    st.dictionaries(st.sampled_from(list(WANTED)), values, max_size=1),
)
def test_the_compiled_check_takes_and_refuses_what_the_judgement_does(time_s, fields, change):
    event = time_s, fields | change
    assert said(CHECK, *event) == said(lambda *args: judge("kind", WANTED, *args), *event)


@given(good)
def test_an_event_of_its_kind_is_taken(fields):
    assert said(CHECK, 1.0, fields) == "taken"


@pytest.mark.parametrize("time_s", [math.nan, math.inf, "now", None, True])
def test_a_time_that_is_none_is_refused_even_without_fields(time_s):
    with pytest.raises(RequestError, match="time_s"):
        compiled("kind", {})(time_s, {})


@pytest.mark.parametrize("time_s", [1e300, -1e300, 2.0**33 + 1])
def test_a_time_that_is_centuries_away_is_refused(time_s):
    event = time_s, {"word": "a", "count": 1, 'it\'s "x"\n': 0.5}
    with pytest.raises(RequestError) as caught:
        CHECK(*event)
    assert caught.value.code == "out_of_range"
