"""proto/socket.md says what edge_runtime/api/frames.py sends and reads: tags, fields, defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from edge_runtime.api import frames
from edge_runtime.api.frames import Label, Predict, Predicted

TEXT = (Path(__file__).parents[2] / "proto" / "socket.md").read_text(encoding="utf-8")
TABLES = re.findall(r"^\| (\d.*) \|$", TEXT, re.MULTILINE)
ROWS = [[cell.strip() for cell in row.split("|")] for row in TABLES]
FIELDS = {int(row[0]): row[2] for row in ROWS}
REPLIES = {row[1] for row in ROWS if len(row) == 3}
REPLY_TO = {int(row[0]): row[3] for row in ROWS if len(row) == 4}
TYPED = r"(as \w+)|`(\w+)` (?:=|str|int|float|bool|bin|map|array)"
STRUCTS: dict[int, Any] = {
    struct.__struct_config__.tag: struct
    for struct in (*get_args(frames.Request), *get_args(frames.Reply))
}
AS = {"as predicted": Predicted, "as predict": Predict, "as label": Label}


def names_of(struct: type[msgspec.Struct]) -> list[str]:
    return list(struct.__struct_fields__)[1:]  # without the id


def test_the_page_tells_of_each_tag_and_of_no_other() -> None:
    assert sorted(FIELDS) == sorted(STRUCTS)


@pytest.mark.parametrize("tag", sorted(STRUCTS))
def test_the_fields_of_a_message_are_those_of_the_page(tag: int) -> None:
    told: list[str] = []
    for phrase, name in re.findall(TYPED, FIELDS[tag]):
        others = names_of(AS[phrase]) if phrase else [name]
        told += [each for each in others if each not in told]

    assert told == names_of(STRUCTS[tag])


@pytest.mark.parametrize("tag", [tag for tag in sorted(STRUCTS) if tag < 128])
def test_each_request_has_a_reply_of_the_page(tag: int) -> None:
    assert REPLY_TO[tag] in REPLIES
