"""proto/asyncapi.yaml says what edge_runtime/wire/subjects.py and the schemas say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_runtime.wire import subjects

PROTO = Path(__file__).parents[2] / "proto"
TEXT = (PROTO / "asyncapi.yaml").read_text(encoding="utf-8")
ADDRESSES = re.findall(r"^    address: (\S+)$", TEXT, re.MULTILINE)
SHA256 = "ab" * 32


def test_each_subject_of_the_code_is_an_address_and_the_other_way_round():
    filled = [
        address.format(
            device="EWR",
            event_class="label",
            name="3.snapshot",
            sha256=SHA256,
            index=2,
            family="coin",
            asker="ab",
        )
        for address in ADDRESSES
    ]

    assert sorted(filled) == sorted(
        [
            subjects.events("EWR", "label"),
            subjects.watermark("EWR"),
            subjects.report("EWR"),
            subjects.metadata("3.snapshot.json"),
            subjects.chunk(SHA256, 2),
            subjects.LEARNER_STATUS,
            subjects.REFRESH,
            subjects.TIME,
            subjects.candidate_chunk(SHA256, 2),
            subjects.gate_judge("coin"),
            subjects.GATE_SIGN,
            subjects.GATE_APPROVE,
            subjects.approve("coin"),
            subjects.submit("coin"),
            subjects.ROLLOUT,
            subjects.answer("ab"),
        ]
    )


@pytest.mark.parametrize(
    ("stream", "covers"),
    [
        (subjects.EVENTS_STREAM, [subjects.EVENTS_ALL]),
        (subjects.STATE_STREAM, subjects.STATE_ALL),
        (subjects.TRUST_STREAM, subjects.TRUST_ALL),
        (subjects.CANDIDATES_STREAM, subjects.CANDIDATES_ALL),
    ],
)
def test_each_stream_of_the_code_is_described_with_its_subjects(stream, covers):
    block = re.search(rf"stream: {stream}\n\s+subjects: \[(.*)\]", TEXT)

    assert block is not None
    assert [subject.strip(" '") for subject in block[1].split(",")] == covers


def test_every_stream_that_is_described_exists_in_the_code():
    described = set(re.findall(r" stream: (\S+)", TEXT))

    assert described == {
        subjects.EVENTS_STREAM,
        subjects.STATE_STREAM,
        subjects.TRUST_STREAM,
        subjects.CANDIDATES_STREAM,
    }


def test_every_schema_that_is_named_exists():
    named = re.findall(r"\$ref: (\./schemas/\S+)", TEXT)

    assert named
    assert [name for name in named if not (PROTO / name).is_file()] == []


def test_every_reference_inside_leads_somewhere():
    for kind, name in re.findall(r"\$ref: '#/(?:components/)?(\w+)/(\w+)'", TEXT):
        section = TEXT.split(f"{kind}:\n", 1)[1]
        assert re.search(rf"^ +{name}:$", section, re.MULTILINE), f"{kind}/{name}"
