"""The feature spec: what it accepts, what its hash means, and how it names what is wrong."""

from __future__ import annotations

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.features.spec import Spec

HEAD = "version = 1\n"


def feature(text: str) -> str:
    return f"{HEAD}[[features]]\n{text}\n"


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


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("version = ", "bad_toml", "TOML"),
        (HEAD, "empty_spec", "[[features]]"),
        (HEAD + "features = []", "empty_spec", "no feature"),
        ("version = 2\n[[features]]\nname='a'\nfield='x'", "bad_version", "2"),
        ("[[features]]\nname='a'\nfield='x'", "bad_version", "None"),
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
