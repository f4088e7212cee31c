"""tools/bench-session: its parts run against the device's own sessions."""

from __future__ import annotations


def test_costs_are_measured_and_the_bounds_hold(measured) -> None:
    rows = measured("bench-session", "memory", "hostile", "answers", "rankings", "swap")

    assert 0 < rows["memory per session, 64-dim"] <= 24
    for what, value in rows.items():
        if "share used" in what or "trust region" in what:
            assert 0 < value <= 1, what
        if "bit-equal" in what or "oldest out" in what:
            assert value == 1, what
        if "p50" in what and "added" not in what:
            assert value > 0, what
        if "failed requests" in what:
            assert value == 0, what


def test_visitors_click_more_of_what_sessions_show(measured) -> None:
    rows = measured("bench-session", "clicks")
    what = "simulator with drifting tastes: clicks per session"

    assert rows[f"{what} against frozen, 1 seeds"] > 0
    assert 0 < rows[f"{what}, with session.rank"] < rows[f"{what}, tastes known beforehand"]
    assert rows[f"{what}, popularity list"] > 0


def test_data_that_are_not_there_are_left_out(measured, tmp_path) -> None:
    assert measured("bench-session", "movielens", HEADWATER_DATA=str(tmp_path)) == {}


def test_a_prior_of_what_devices_export_helps_and_a_hostile_device_is_bounded(measured) -> None:
    rows = measured("bench-session", "export")
    worth = {what.split(": ", 2)[-1]: value for what, value in rows.items() if "log loss" in what}

    assert worth["prior of moments, release 1, after 5-9 labels"] < min(
        worth["prior that knows nothing, after 5-9 labels"], -2
    )
    moved = [value for what, value in rows.items() if "mean moves by" in what]
    assert len(moved) == 2
    assert all(0 < each < 0.15 for each in moved)
