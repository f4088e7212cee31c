"""What is done to a value between its source and the model, and that no text of a spec is code."""

from __future__ import annotations

import ast
import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.features.compiler import compiled, hashed
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec

TABLES = """
[tables.places]
version = "2013"
columns = ["height", "zone", "runways"]
rows = { ABQ = [1619.5, "west", 3], BOS = [6, "east", 6], "42" = [7, "east", 1] }
"""


def spec_of(*features: str) -> Spec:
    parts = [f'[[features]]\nname = "f{i}"\n{text}' for i, text in enumerate(features)]
    return Spec.from_toml("\n".join(["version = 1", *parts, TABLES]))


def asked(spec: Spec, fields=None, time_s: float = 0.0) -> list[float]:
    return Engine(spec).vector(time_s, fields or {}).tolist()


@pytest.mark.parametrize(
    ("feature", "fields", "expected"),
    [
        ('field = "x"', {"x": 3}, [3]),
        ('field = "x"\nfill = 2.0', {}, [2]),
        ('field = "x"\nbounds = [0, 10]', {"x": -5.0}, [0]),
        ('field = "x"\nbounds = [0, 10]', {"x": 10**18}, [10]),
        ('field = "x"\nbounds = [4, 10]', {}, [4]),  # the fill is clipped as well
        ('field = "x"\nlog1p = true', {"x": 19.0}, [math.log(20)]),
        ('field = "x"\nlog1p = true', {"x": -19.0}, [-math.log(20)]),
        ('field = "x"\nlog1p = true\nbounds = [0, 9]', {"x": 1e9}, [math.log(10)]),
        ('field = "x"\nstandardise = { mean = 10, std = 4 }', {"x": 18.0}, [2]),
        ('field = "x"\nlog1p = true\nstandardise = { mean = 1, std = 2 }', {"x": 0}, [-0.5]),
        ('field = "x"\nbucket = [1, 5.5]', {"x": 0.9}, [0]),
        ('field = "x"\nbucket = [1, 5.5]', {"x": 1}, [1]),
        ('field = "x"\nbucket = [1, 5.5]', {"x": 5.5}, [2]),
        ('field = "x"\nbounds = [0, 2]\nbucket = [1, 5.5]', {"x": 5.5}, [1]),
        ('field = "x"\nbucket = [1]\none_hot = true', {"x": 7}, [0, 1]),
        ('field = "w"\nvocabulary = ["a", "b"]', {"w": "b"}, [2]),
        ('field = "w"\nvocabulary = ["a", "b"]', {"w": "c"}, [0]),
        ('field = "w"\nvocabulary = ["a", "b"]\none_hot = true', {"w": "b"}, [0, 1]),
        ('field = "w"\nvocabulary = ["a", "b"]\none_hot = true', {"w": "c"}, [0, 0]),
        ('field = "w"\nvocabulary = [7, 8]', {"w": 8}, [2]),
        ('field = "w"\nhash = 10', {"w": "ABQ"}, [zlib.crc32(b"ABQ") % 10]),
        ('field = "w"\nhash = 10', {"w": 42}, [zlib.crc32(b"42") % 10]),
        ('field = "w"\nhash = 10', {}, [0]),
        ('field = "w"\nhash = 3\none_hot = true', {"w": "a"}, [1, 0, 0]),
        ('lookup = { table = "places", key = "w", column = "height" }', {"w": "ABQ"}, [1619.5]),
        ('lookup = { table = "places", key = "w", column = "height" }', {"w": 42}, [7]),
        ('lookup = { table = "places", key = "w", column = "height" }\nfill = 9', {"w": "X"}, [9]),
        (
            'lookup = { table = "places", key = "w", column = "zone" }\nvocabulary = ["east"]',
            {"w": "BOS"},
            [1],
        ),
        (
            'lookup = { table = "places", key = "w", column = "zone" }\nhash = 5',
            {"w": "ABQ"},
            [zlib.crc32(b"west") % 5],
        ),
        (
            'lookup = { table = "places", key = "w", column = "runways" }\nbucket = [2, 4]',
            {"w": "ABQ"},
            [1],
        ),
    ],
)
def test_a_value_goes_through_its_transforms_in_the_stated_order(feature, fields, expected):
    assert asked(spec_of(feature), fields) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("cycle", "time_s", "turns"),
    [
        ('of = "day"', 6 * 3600.0, 0.25),
        ('of = "day"', 86400.0 * 20_000 + 12 * 3600.0, 0.5),
        ('of = "day", utc_offset_s = -18000', 5 * 3600.0, 0.0),
        ('of = "week"', 7 * 86400.0 * 3 + 86400.0 * 3.5, 0.5),
        ('of = "year"', 365.2425 * 86400.0 * 40.25, 0.25),
        ('of = "day"', -6 * 3600.0, 0.75),
    ],
)
def test_a_cycle_is_the_sine_and_cosine_of_where_time_stands_in_it(cycle, time_s, turns):
    spec = spec_of(f"cycle = {{ {cycle} }}")
    expected = [math.sin(math.tau * turns), math.cos(math.tau * turns)]
    assert spec.names == ["f0.sin", "f0.cos"]
    assert asked(spec, {}, time_s) == pytest.approx(expected, abs=1e-6)


def test_columns_are_named_after_what_they_stand_for_and_say_what_they_index():
    spec = spec_of(
        'field = "w"\nvocabulary = ["AA", "UA"]\none_hot = true',
        'field = "w"\nvocabulary = ["AA", "UA"]',
        'field = "x"\nbucket = [5]\none_hot = true',
        'field = "x"',
        'field = "w"\nhash = 8',
        'field = "x"\nbucket = [1, 2, 3]',
        'cycle = { of = "week" }',
    )
    words = "f0=AA f0=UA f1 f2=0 f2=1 f3 f4 f5 f6.sin f6.cos"
    assert spec.names == words.split()
    assert [column.indices for column in spec.columns] == [0, 0, 3, 0, 0, 0, 8, 4, 0, 0]
    assert spec.size == len(asked(spec, {"w": "UA", "x": 7.0})) == 10


WILD = 'it\'s "\\n\n{x}"); raise SystemExit  #\\'


def test_no_text_of_a_spec_becomes_code():
    quoted = '"' + WILD.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    spec = Spec.from_toml(f"""
version = 1
[[features]]
name = {quoted}
field = {quoted}
[[features]]
name = "words"
field = {quoted}
vocabulary = [{quoted}]
[[features]]
name = "window"
window = {{ over = {quoted}, key = {quoted}, value = {quoted}, statistic = "sum", span_s = 1 }}
[[features]]
name = "look"
lookup = {{ table = {quoted}, key = {quoted}, column = {quoted} }}
[tables.{quoted}]
version = {quoted}
columns = [{quoted}]
rows = {{ {quoted} = [5.0] }}
""")
    engine = Engine(spec)
    engine.observe(WILD, 1.0, {WILD: 3.0})
    assert engine.vector(1.0, {WILD: 3.0}).tolist() == [3, 0, 3, 0]
    functions = ast.parse(engine.source).body
    assert [type(each) for each in functions] == [ast.FunctionDef] * 3


def test_fields_that_look_like_variables_are_told_apart():
    fields = {
        "x": 1.0,
        "units_of_x": 2.0,
        "0": 3.0,
        "x_0": 4.0,
        "time_s": 5.0,
        "é": 6.0,
        "f_x": 7.0,
    }
    windows = [
        f'window = {{ over = "k", value = "{name}", statistic = "sum", span_s = 9 }}'
        for name in fields
    ]
    engine = Engine(spec_of(*windows))
    engine.observe("k", 1.0, fields)
    assert engine.vector(1.0, {}).tolist() == list(fields.values())


def test_equal_specs_share_one_program():
    assert compiled(spec_of('field = "x"')) is compiled(spec_of('field = "x"'))
    assert compiled(spec_of('field = "x"')) is not compiled(spec_of('field = "y"'))


numbers = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-300, 1e300)


@given(numbers, numbers, st.tuples(numbers, positive, numbers, st.booleans()))
def test_nothing_that_is_not_finite_comes_out(x, time_s, steps):
    mean, std, fill, log = steps
    scale = f"standardise = {{ mean = {mean!r}, std = {std!r} }}"
    steps = f"fill = {fill!r}\nlog1p = {str(log).lower()}\n{scale}"
    spec = spec_of(
        f'field = "x"\n{steps}',
        'field = "x"',
        f'window = {{ over = "k", value = "x", statistic = "mean", span_s = 9 }}\n{steps}',
        'window = { over = "k", statistic = "time_since_last", span_s = 1e300 }',
        'cycle = { of = "year", utc_offset_s = 3600 }',
    )
    engine = Engine(spec)
    engine.observe("k", time_s, {"x": x})
    for asked_s, fields in ((time_s, {"x": x}), (1e300, {"x": x}), (time_s, {}), (-time_s, {})):
        assert np.isfinite(engine.vector(asked_s, fields)).all()


def test_even_what_slipped_past_the_check_does_not_come_out():
    assert np.isfinite(asked(spec_of('field = "x"'), {"x": math.nan})).all()
    assert np.isfinite(asked(spec_of('field = "x"'), {"x": math.inf})).all()


def test_hashes_never_change():
    assert [hashed(word, 1000) for word in ("ABQ", "", "Zoë ✈", 7, -1)] == [552, 0, 802, 346, 962]
