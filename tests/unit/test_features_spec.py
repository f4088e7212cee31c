"""The feature spec: what it accepts, what its hash means, and how it names what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec

HEAD = "version = 1\n"


def feature(text: str) -> str:
    return f"{HEAD}[[features]]\n{text}\n"


TABLE = """[tables.facts]
version = "1"
columns = ["size", "zone"]
rows = { A = [1.0, "x"], B = [2.0, "y"] }
"""


def windowed(text: str) -> str:
    return feature(f'name = "w"\nwindow = {{ {text} }}')


def test_a_spec_survives_its_own_json(toy_spec):
    again = Spec.from_json(toy_spec.to_json())
    assert again == toy_spec
    assert again.hash == toy_spec.hash
    assert again.names == ["carrier", "distance", "seen_1h", "delay_1h", "carrier_delay_1e4s"]
    assert again.size == 5


def test_the_hash_of_a_given_spec_never_changes():
    spec = Spec.from_toml(feature('name = "d"\nfield = "distance"\nbounds = [0, 6000]'))
    assert spec.to_json() == (
        '{"features":[{"bounds":[0.0,6000.0],"field":"distance","name":"d"}],"version":1}'
    )
    assert spec.hash == "c7ee3ab2ae3354a2"


def test_layout_and_comments_do_not_move_the_hash_but_order_and_values_do():
    one = '[[features]]\nname="a"\nfield="x"\n'
    two = '[[features]]\nname="b"\nfield="y"\n'
    spec = Spec.from_toml(HEAD + one + two)
    assert Spec.from_toml(f"# a word\n{HEAD}\n\n{one}\n{two}").hash == spec.hash
    assert Spec.from_toml(HEAD + two + one).hash != spec.hash
    assert Spec.from_toml(HEAD + one + two + "fill = 1.0").hash != spec.hash


def test_a_subset_keeps_the_order_of_the_spec(toy_spec):
    assert toy_spec.subset(["delay_1h", "carrier"]).names == ["carrier", "delay_1h"]


def test_a_subset_of_an_unknown_feature_is_refused_with_the_nearest_name(toy_spec):
    with pytest.raises(ConfigError) as caught:
        toy_spec.subset(["carier"])
    assert caught.value.code == "unknown_feature"
    assert "'carrier'" in caught.value.hint


def looked_up(text: str, more: str = "") -> str:
    return feature(f'name = "l"\nlookup = {{ table = {text} }}\n{more}\n{TABLE}')


def test_a_spec_with_tables_survives_its_own_json_and_its_hash_covers_their_cells():
    text = looked_up("'facts', key = 'k', column = 'size'")
    spec = Spec.from_toml(text)
    again = Spec.from_json(spec.to_json())
    assert (again, again.hash) == (spec, spec.hash)
    other = Spec.from_toml(text.replace("2.0", "3.0"))
    assert other != spec
    assert other.hash != spec.hash


def test_a_subset_carries_the_tables_that_it_looks_up_and_no_others():
    both = looked_up("'facts', key = 'k', column = 'size'")
    spec = Spec.from_toml(both.replace("[tables", "[[features]]\nname='x'\nfield='x'\n[tables"))
    assert spec.subset(["x"]).tables == {}
    assert spec.subset(["l"]).tables.keys() == {"facts"}


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (windowed("over = 'k', statistic = 'meen', value = 'v', span_s = 1"), "'mean'"),
        (looked_up("'fact', key = 'k', column = 'size'"), "'facts'"),
        (looked_up("'facts', key = 'k', column = 'siz'"), "'size'"),
        (feature("name = 'a'\nfield = 'x'\nbuckets = [1]"), "'bucket'"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_word(text, hint):
    with pytest.raises(ConfigError) as caught:
        Spec.from_toml(text)
    assert caught.value.hint == f"did you mean {hint}?"


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("version = ", "bad_toml", "TOML"),
        (HEAD, "empty_spec", "[[features]]"),
        (HEAD + "features = []", "empty_spec", "no feature"),
        ("version = 2\n[[features]]\nname='a'\nfield='x'", "bad_version", "2"),
        ("[[features]]\nname='a'\nfield='x'", "bad_version", "missing"),
        (HEAD + "extra = 1\n[[features]]\nname='a'\nfield='x'", "unknown_key", "'extra'"),
        (HEAD + "features = [1]", "bad_value", "'#1'"),
        (feature("field = 'x'"), "bad_value", "'#1'"),
        (feature("name = ''\nfield = 'x'"), "bad_value", "name"),
        (feature("name = 'a'\nfiled = 'x'"), "unknown_key", "'a': filed"),
        (feature("name = 'a'"), "bad_source", "'a': field"),
        (feature("name = 'a'\nfield = 3"), "bad_value", "'a'"),
        (feature("name = 'a'\nfield = 'x'\nfill = nan"), "bad_value", "fill"),
        (feature("name = 'a'\nfield = 'x'\nfill = 'x'"), "bad_value", "fill"),
        (feature("name = 'a'\nfield = 'x'\nbounds = [2, 1]"), "bad_value", "bounds"),
        (feature("name = 'a'\nfield = 'x'\nbounds = [0, inf]"), "bad_value", "bounds"),
        (feature("name = 'a'\nfield = 'x'\nbounds = [0, 1e300]"), "bad_value", "bounds"),
        (feature("name = 'a'\nfield = 'x'\nvocabulary = []"), "bad_value", "vocabulary"),
        (feature("name = 'a'\nfield = 'x'\nvocabulary = ['u', 'u']"), "bad_value", "vocabulary"),
        (
            feature(
                "name = 'a'\nvocabulary = ['u']\nwindow = {over='k',statistic='count',span_s=1}"
            ),
            "bad_source",
            "vocabulary",
        ),
        (
            HEAD + "[[features]]\nname='a'\nfield='x'\n[[features]]\nname='a'\nfield='y'",
            "duplicate_name",
            "'a'",
        ),
        (windowed("over = 'k', statistic = 'median', span_s = 1"), "unknown_statistic", "median"),
        (windowed("over = 'k', statistic = 'count', span = 1"), "unknown_key", "window.span"),
        (windowed("over = 'k', statistic = 'count'"), "bad_value", "span_s"),
        (windowed("over = 'k', statistic = 'count', span_s = 0"), "bad_value", "window.span_s"),
        (windowed("over = 'k', statistic = 'count', span_s = inf"), "bad_value", "window.span_s"),
        (windowed("over = 'k', statistic = 'mean', span_s = 1"), "missing_key", "window.value"),
        (windowed("over = '', statistic = 'count', span_s = 1"), "bad_value", "window.over"),
        (
            windowed("over = 'k', statistic = 'count', span_s = 1, span_events = 1"),
            "bad_value",
            "span_events",
        ),
        (windowed("over = 'k', statistic = 'count', span_events = 0"), "bad_value", "span_events"),
        (
            windowed("over = 'k', statistic = 'count', span_events = 99999"),
            "bad_value",
            "span_events",
        ),
        (
            windowed("over = 'k', statistic = 'count', span_s = 1, half_life_s = 1"),
            "bad_value",
            "half_life_s",
        ),
        (
            windowed("over = 'k', value = 'v', statistic = 'decayed_mean', span_s = 1"),
            "missing_key",
            "half_life_s",
        ),
        (
            windowed("over='k', value='v', statistic='decayed_mean', half_life_s=1, span_s=1"),
            "bad_value",
            "window.span_s",
        ),
        (
            windowed("over = 'k', value = 'v', statistic = 'decayed_mean', half_life_s = -1"),
            "bad_value",
            "half_life_s",
        ),
        (windowed("over = 'k', statistic = 'rate', span_events = 1"), "missing_key", "span_s"),
        (windowed("over = 'k', statistic = 'distinct', span_s = 1"), "missing_key", "value"),
        (
            windowed("over = 'label', value = 'v', statistic = 'mean', span_s = 1"),
            "bad_value",
            "window.value",
        ),
        (feature("name = 'a'\nfield = 'x'\ncycle = { of = 'day' }"), "bad_source", "'a'"),
        (feature("name = 'a'\ncycle = { of = 'month' }"), "bad_value", "'a'"),
        (feature("name = 'a'\ncycle = { off = 'day' }"), "unknown_key", "cycle.off"),
        (feature("name = 'a'\ncycle = { of = 'day', utc_offset_s = 1e9 }"), "bad_value", "utc"),
        (feature("name = 'a'\ncycle = { of = 'day' }\nlog1p = true"), "bad_value", "log1p"),
        (feature("name = 'a'\nfield = 'x'\nhash = 1"), "bad_value", "hash"),
        (feature("name = 'a'\nfield = 'x'\nhash = 9\nvocabulary = ['u']"), "bad_value", "hash"),
        (feature("name = 'a'\nfield = 'x'\nhash = 9\nlog1p = true"), "bad_value", "log1p"),
        (feature("name = 'a'\nfield = 'x'\nhash = 9\nbucket = [1]"), "bad_value", "bucket"),
        (feature("name = 'a'\nfield = 'x'\nbucket = []"), "bad_value", "bucket"),
        (feature("name = 'a'\nfield = 'x'\nbucket = [2, 1]"), "bad_value", "bucket"),
        (feature("name = 'a'\nfield = 'x'\nbucket = [1, 1]"), "bad_value", "bucket"),
        (feature("name = 'a'\nfield = 'x'\nbucket = [1, inf]"), "bad_value", "bucket"),
        (feature("name = 'a'\nfield = 'x'\none_hot = true"), "bad_value", "one_hot"),
        (
            feature("name = 'a'\nfield = 'x'\nstandardise = { mean = 0, std = 0 }"),
            "bad_value",
            "standardise",
        ),
        (
            feature("name = 'a'\nfield = 'x'\nstandardise = { mean = nan, std = 1 }"),
            "bad_value",
            "standardise",
        ),
        (
            feature("name = 'a'\nfield = 'x'\nstandardise = { meen = 0, std = 1 }"),
            "unknown_key",
            "standardise.meen",
        ),
        (looked_up("'fact', key = 'k', column = 'size'"), "unknown_table", "'fact'"),
        (looked_up("'facts', key = 'k', column = 'siz'"), "unknown_column", "'siz'"),
        (looked_up("'facts', key = 'k', column = 'zone'"), "bad_value", "'A'"),
        (looked_up("'facts', key = 'k', colum = 'zone'"), "unknown_key", "lookup.colum"),
        (
            looked_up("'facts', key = 'k', column = 'zone'", "vocabulary = ['z']"),
            "bad_value",
            "'zone'",
        ),
        (looked_up("'facts', key = 'k', column = 'size'") + "C = 1", "unknown_key", "'facts': C"),
        (
            looked_up("'facts', key = 'k', column = 'size'").replace('"x"]', "]"),
            "bad_table",
            "row 'A'",
        ),
        (
            looked_up("'facts', key = 'k', column = 'size'").replace("1.0", "inf"),
            "bad_table",
            "row 'A'",
        ),
        (
            looked_up("'facts', key = 'k', column = 'size'").replace('"zone"', '"size"'),
            "bad_table",
            "'facts'",
        ),
        (
            looked_up("'facts', key = 'k', column = 'size'").replace('version = "1"', "vers = 1"),
            "unknown_key",
            "'facts': vers",
        ),
        (
            HEAD + "[[features]]\nname='a'\nfield='x'\nvocabulary=['u']\none_hot=true\n"
            "[[features]]\nname='a=u'\nfield='y'",
            "duplicate_name",
            "'a=u'",
        ),
    ],
)
def test_each_mistake_has_its_code_and_names_what_is_wrong(text, code, named):
    with pytest.raises(ConfigError) as caught:
        Spec.from_toml(text)
    assert caught.value.code == code
    assert named in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"features": 1}', "[" * 100_000])
def test_text_that_is_no_spec_is_a_config_error(text):
    with pytest.raises(ConfigError):
        Spec.from_json(text)


KEYS = [
    *("version", "features", "tables", "name", "field", "vocabulary", "window", "fill", "bounds"),
    *("lookup", "cycle", "log1p", "standardise", "bucket", "hash", "one_hot", "over", "statistic"),
    *("span_s", "key", "value", "span_events", "half_life_s", "table", "column", "of", "mean"),
    *("std", "utc_offset_s", "columns", "rows", "x"),
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["x", "", "count", "distinct", "decayed_mean", "label", "day"])
)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=20,
)
parts = dict.fromkeys(("window", "lookup", "cycle", "standardise", "bucket", "hash"), documents)
features = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b"])},
    optional={"field": st.just("x"), "fill": scalars, "one_hot": st.booleans(), **parts},
)


@given(st.lists(features, max_size=3), documents)
def test_whatever_a_document_holds_it_is_a_spec_that_runs_or_a_config_error(features, tables):
    document = {"version": 1, "features": features, "tables": tables}
    try:
        spec = Spec.from_document(document)
    except ConfigError:
        return
    assert Spec.from_json(spec.to_json()) == spec
    assert len(Engine(spec).packed(0.0, {"x": 1})) == 4 * spec.size


@given(documents)
def test_whatever_stands_in_place_of_a_document_is_a_config_error(document):
    with pytest.raises(ConfigError):
        Spec.from_document(document)
