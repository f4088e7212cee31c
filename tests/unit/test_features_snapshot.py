"""Snapshots of earlier versions, frozen when they were current, give what they gave."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from edge_runtime.errors import RequestError
from edge_runtime.features import snapshot
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("version", [1, 2])
def test_a_frozen_snapshot_answers_as_it_did(version):
    frozen = json.loads((FIXTURES / f"windows-snapshot-v{version}.json").read_text())
    spec = Spec.from_json(frozen["spec"])
    engine = Engine(spec, lateness_s=frozen["lateness_s"])
    engine.restore(base64.b64decode(frozen["snapshot_b64"]))
    assert (spec.hash, spec.to_json()) == (frozen["hash"], frozen["spec"])
    assert len(frozen["answers"]) >= 12
    for asked in frozen["answers"]:
        fields = {"carrier": asked["carrier"], "distance": 100.0}
        assert engine.vector(asked["time_s"], fields).tolist() == asked["vector"]


def test_a_snapshot_of_the_current_version_is_written_to_the_bit_as_it_was():
    frozen = json.loads((FIXTURES / "windows-snapshot-v2.json").read_text())
    engine = Engine(Spec.from_json(frozen["spec"]), lateness_s=frozen["lateness_s"])
    data = base64.b64decode(frozen["snapshot_b64"])
    engine.restore(data)
    assert engine.snapshot() == data


def test_a_snapshot_of_a_later_version_is_refused_by_name(toy_spec):
    data = Engine(toy_spec).snapshot()
    body = data[8:9] + b"\x03" + data[10:]
    later = data[:4] + snapshot.zlib.crc32(body).to_bytes(4, "little") + body
    with pytest.raises(RequestError, match="version 3; this reads 2") as caught:
        Engine(toy_spec).restore(later)
    assert caught.value.code == "bad_snapshot"
