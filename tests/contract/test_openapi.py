"""proto/openapi.yaml says what edge_runtime/api serves: paths, methods, types, fields, statuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.api import app, edge_v1, oip, sessions_v1
from edge_runtime.inference.tensors import DTYPES
from edge_runtime.personal.explanation import Moved
from edge_runtime.runtime import Prediction
from edge_runtime.session import Explanation, Labelled, Ranked, SessionPrediction

yaml = pytest.importorskip("yaml")
PATH = Path(__file__).parents[2] / "proto" / "openapi.yaml"
TEXT = PATH.read_text(encoding="utf-8")
DOCUMENT: Any = yaml.safe_load(TEXT)
SCHEMAS = DOCUMENT["components"]["schemas"]


class NoModels:
    families = ()


def served() -> set[tuple[str, str]]:
    """(method, path) of everything that the application has."""
    tables = app.App(NoModels(), dict)
    found = {(method, path) for path, (method, _) in tables._alone.items() if path != "/v2/"}
    for word, (method, _) in tables._of_model.items():
        end = f"/{word}" if word else ""
        found.add((method, f"/v2/models/{{family}}{end}"))
        found.add((method, f"/v2/models/{{family}}/versions/{{release}}{end}"))
    for word, (method, _) in tables._of_event.items():
        found.add((method, f"/edge/v1/{word}/{{family}}"))
    for word, (method, _) in tables._of_session.items():
        found.add((method, f"/edge/v1/session/{{family}}/{word}"))
    return found


def test_each_path_that_is_served_is_described_and_the_other_way_round() -> None:
    described = {
        (method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods
    }

    assert described == served()


@pytest.mark.parametrize(("method", "path"), sorted(served()))
def test_each_path_that_is_described_is_routed_with_its_method(method: str, path: str) -> None:
    target = path.format(family="flights", release="r1").encode()

    wanted, _, family, release = app.App(NoModels(), dict)._route(target)

    assert wanted == method
    assert family == ("flights" if "{family}" in path else "")
    assert release == ("r1" if "{release}" in path else "")


def test_types_fields_and_extensions_are_those_of_the_code() -> None:
    assert SCHEMAS["datatype"]["enum"] == list(DTYPES)
    assert SCHEMAS["server"]["properties"]["extensions"]["const"] == oip.EXTENSIONS
    assert SCHEMAS["model"]["properties"]["platform"]["const"] == oip.PLATFORM
    for schema, struct in (
        ("event", edge_v1.EventBody),
        ("label", edge_v1.LabelBody),
        ("prediction", Prediction),
        ("session", sessions_v1.SessionBody),
        ("session_event", sessions_v1.SessionEventBody),
        ("ranking", sessions_v1.RankBody),
        ("session_label", sessions_v1.SessionLabelBody),
        ("forget", sessions_v1.ForgetBody),
        ("session_prediction", SessionPrediction),
        ("labelled", Labelled),
    ):
        assert list(SCHEMAS[schema]["properties"]) == list(struct.__struct_fields__), schema
    for schema, fields in (
        (SCHEMAS["places"]["properties"]["places"]["items"], Ranked.__struct_fields__),
        (SCHEMAS["explanation"], [each.name for each in dataclasses.fields(Explanation)]),
        (
            SCHEMAS["explanation"]["properties"]["moved"]["items"],
            [each.name for each in dataclasses.fields(Moved)],
        ),
    ):
        assert list(schema["properties"]) == list(fields)


def test_each_status_of_an_error_is_explained() -> None:
    _, _, statuses = DOCUMENT["info"]["description"].partition("Statuses of errors:")
    explained = {int(status) for status in re.findall(r"\b(4\d\d|5\d\d)\b", statuses)}

    assert explained == {400, 500, *app._STATUS.values()}


def test_every_reference_inside_leads_somewhere() -> None:
    for kind, name in re.findall(r"\$ref: '#/components/(\w+)/(\w+)'", TEXT):
        assert name in DOCUMENT["components"][kind]
