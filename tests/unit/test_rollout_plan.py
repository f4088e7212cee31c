"""Plans: what they may say, who gets the canary, and which arm answers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import TrustError
from edge_runtime.rollout.plan import (
    NUMBER_MAX,
    Plan,
    PlanArm,
    Variant,
    arms_for,
    choose,
    decode_plan,
    draw,
    encode_plan,
    model_path,
    plan_path,
    propensity,
)


def arm(release: str = "r1", **changes: object) -> PlanArm:
    facts = {"path": model_path("f", release), "sha256": "ab" * 32, "counter": 1, "weight": 1.0}
    return PlanArm(release, **(facts | changes))  # type: ignore[arg-type]


def plan(**changes: object) -> Plan:
    facts = {"family": "f", "seq": 3, "stable": arm(), "canary": arm("r2", weight=0.25)}
    return Plan(**(facts | changes))  # type: ignore[arg-type]


def test_a_plan_survives_its_bytes() -> None:
    one = plan(selector={"region": "east"}, salt="x", reason="offered", note="for people")
    assert decode_plan(encode_plan(one)) == one


def two_variants(release: str = "r1", **changes: object) -> PlanArm:
    own = Variant("int8", model_path("f", release), "ab" * 32)
    facts = {"name": "float32", "path": model_path("f", release, "float32"), "sha256": "cd" * 32}
    other = Variant(**(facts | changes))  # type: ignore[arg-type]
    return arm(release, variants=(own, other))


def test_a_plan_with_variants_survives_its_bytes() -> None:
    one = plan(stable=two_variants(), canary=two_variants("r2"))
    assert decode_plan(encode_plan(one)) == one
    assert [each.name for each in one.stable.packages] == ["int8", "float32"]


def test_an_arm_of_one_package_may_load_that_one() -> None:
    assert arm("r1").packages == (Variant("", model_path("f", "r1"), "ab" * 32),)


def test_a_plan_without_variants_is_what_it_was_before_there_were_any() -> None:
    old = msgspec.json.decode(encode_plan(plan()))
    for name in ("stable", "canary"):
        del old[name]["variants"]
    assert decode_plan(msgspec.json.encode(old)) == plan()


def test_paths_stay_inside_their_role() -> None:
    assert model_path("f", "r1") == "m/f/r1.onnx"
    assert model_path("f", "r1", "int8") == "m/f/r1.int8.onnx"
    assert plan_path("f") == "p/f.json"


@pytest.mark.parametrize(
    "bad",
    [
        plan(seq=0),
        plan(seq=NUMBER_MAX + 1),
        plan(family="../f"),
        plan(stable=arm("a/b")),
        plan(stable=arm(sha256="AB" * 32)),
        plan(stable=arm(weight=0.0)),
        plan(stable=arm(counter=-1)),
        plan(canary=arm("r2", weight=-0.1)),
        plan(canary=arm("r2", weight=float("inf"))),
        plan(stable=two_variants(path=model_path("f", "r2", "float32"))),
        plan(stable=two_variants(path="p/f.json")),
        plan(stable=two_variants(sha256="no hash")),
        plan(stable=two_variants(name="", path=model_path("f", "r1"))),
        plan(stable=two_variants(name="int8", path=model_path("f", "r1", "int8"))),
        plan(stable=arm(variants=two_variants().variants[1:])),
    ],
)
def test_a_plan_out_of_range_is_refused_in_both_directions(bad: Plan) -> None:
    with pytest.raises(TrustError, match="bad_plan"):
        encode_plan(bad)
    with pytest.raises(TrustError, match="bad_plan"):
        decode_plan(msgspec.json.encode(bad))


def test_a_plan_of_another_version_is_refused() -> None:
    with pytest.raises(TrustError, match="unknown_plan_version"):
        decode_plan(msgspec.json.encode(plan(version=3)))


@given(st.binary(max_size=200))
def test_garbage_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(TrustError, match="bad_plan"):
        decode_plan(data)


@pytest.mark.parametrize(
    ("selector", "attributes", "names"),
    [
        ({}, {}, ["stable", "canary"]),
        ({"site": "EWR"}, {"site": "EWR", "hw": "a"}, ["stable", "canary"]),
        ({"site": "EWR"}, {"site": "JFK"}, ["stable"]),
        ({"site": "EWR"}, {}, ["stable"]),
        ({"site": "EWR", "hw": "a"}, {"site": "EWR"}, ["stable"]),
    ],
)
def test_a_device_gets_the_canary_when_it_has_every_attribute(
    selector: dict[str, str], attributes: dict[str, str], names: list[str]
) -> None:
    arms = arms_for(plan(selector=selector), "d1", attributes)
    assert [name for name, _ in arms] == names


def test_without_a_canary_every_device_runs_the_stable_arm() -> None:
    assert arms_for(plan(canary=None), "d1", {"site": "EWR"}) == [("stable", arm())]


def test_the_draw_is_frozen() -> None:
    """Every device of every version must draw the same, so these values may never change."""
    assert draw("salt", 1, 1) == 0.7585626459049379
    assert [choose([0.5, 0.5], "salt", 7, seq) for seq in range(8)] == [0, 1, 1, 0, 0, 0, 0, 0]


@given(st.text(max_size=8), st.integers(0, 2**53), st.integers(0, 2**53))
def test_a_draw_lies_in_the_half_open_unit_interval(salt: str, epoch: int, seq: int) -> None:
    assert 0.0 <= draw(salt, epoch, seq) < 1.0


@pytest.mark.parametrize("weights", [[0.9, 0.1], [3.0, 1.0], [1.0, 0.0]])
def test_arms_answer_in_proportion_to_their_propensity(weights: list[float]) -> None:
    count = 20_000
    answered = sum(choose(weights, "s|EWR", 1, seq) for seq in range(count))
    assert answered / count == pytest.approx(propensity(weights, 1), abs=0.01)


def test_propensities_sum_to_one() -> None:
    weights = [3.0, 1.0]
    assert [propensity(weights, index) for index in (0, 1)] == [0.75, 0.25]
    assert choose([0.2], "s", 1, 1) == 0
    assert propensity([0.2], 0) == 1.0
