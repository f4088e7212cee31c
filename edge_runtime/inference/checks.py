"""Checks of events: whether the fields that an application sends are those that it may send.

Why: everything after this point trusts the event, so each one is checked, and the check of a good
one must cost next to nothing. For each kind one function is written out that lets the usual event
pass in one expression; whatever it does not let pass is judged field by field.

Invariants: the function and the judgement agree; the judgement alone refuses, and names the field.

Knows nothing about packages and features.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any, Literal

from edge_runtime.errors import RequestError

TEXT_MAX = 1024
TIME_MAX_S = 2.0**33
"""Times lie within 272 years of 1970: one that is not would take the event clock with it."""

_SHORT = 64  # characters that are looked at for being ASCII on the fast way
_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1

FieldType = Literal["str", "int", "float"]
Check = Callable[[float, Mapping[str, object]], None]


def compiled(kind: str, wanted: Mapping[str, FieldType]) -> Check:
    """The check of events of `kind`, given their time and their fields.

    Raises what it finds: RequestError (unknown_field, missing_field, wrong_type, not_finite,
    out_of_range), naming the field.
    """

    def judged(time_s: float, fields: Mapping[str, object]) -> None:
        judge(kind, wanted, time_s, fields)

    names: dict[str, Any] = {"judged": judged, "inf": float("inf")}
    exec(compile(_source(wanted), f"<check of {kind!r}>", "exec"), names)  # noqa: S102 - our own source; names are literals
    check: Check = names["check"]
    return check


def _source(wanted: Mapping[str, FieldType]) -> str:
    variables = {name: f"f_{number}" for number, name in enumerate(wanted)}
    usual = ["type(time_s) is float", f"{-TIME_MAX_S} <= time_s <= {TIME_MAX_S}"]
    usual += [f"len(fields) == {len(wanted)}"]
    usual += [_usual(variables[name], want) for name, want in wanted.items()]
    return "\n".join(
        [
            "def check(time_s, fields):",
            "    try:",
            *(f"        {variable} = fields[{name!r}]" for name, variable in variables.items()),
            f"        usual = {' and '.join(usual)}",
            "    except KeyError:",
            "        usual = False",
            "    if not usual:",
            "        judged(time_s, fields)",
        ]
    )


def _usual(x: str, want: FieldType) -> str:
    integer = f"type({x}) is int and {_INT_MIN} <= {x} <= {_INT_MAX}"
    if want == "str":
        return f"type({x}) is str and len({x}) <= {_SHORT} and {x}.isascii()"
    if want == "int":
        return integer
    return f"(type({x}) is float and -inf < {x} < inf or {integer})"


def judge(
    kind: str, wanted: Mapping[str, FieldType], time_s: object, fields: Mapping[str, object]
) -> None:
    """Judge an event field by field. Raises: RequestError, as the compiled check."""
    _check_number(kind, "time_s", time_s)
    if not -TIME_MAX_S <= time_s <= TIME_MAX_S:  # type: ignore[operator]  # it is a number
        what = f"{kind}.time_s {time_s} is no time of ours"
        raise RequestError("out_of_range", what, "send seconds since the epoch, UTC")
    for name, value in fields.items():
        _check_field(kind, name, value, wanted)
    if len(fields) < len(wanted):
        missing = next(name for name in wanted if name not in fields)
        raise RequestError("missing_field", f"{kind}.{missing} is missing")


def _check_field(kind: str, name: str, value: object, wanted: Mapping[str, FieldType]) -> None:
    want = wanted.get(name)
    if want is None:
        raise unknown("unknown_field", f"{kind}.{name!s:.64} is not a field of {kind}", wanted)
    if want != "str":
        if want == "int" and type(value) is not int:
            raise _wrong_type(kind, name, value, want)
        _check_number(kind, name, value)
    elif not isinstance(value, str):
        raise _wrong_type(kind, name, value, want)
    elif len(value) > TEXT_MAX or not _is_unicode(value):
        raise RequestError(
            "out_of_range",
            f"{kind}.{name} is not text of at most {TEXT_MAX} characters that UTF-8 can carry",
        )


def _check_number(kind: str, name: str, value: object) -> None:
    if type(value) is float:
        if not isfinite(value):
            raise RequestError("not_finite", f"{kind}.{name} is {value}")
    elif type(value) is not int:
        raise _wrong_type(kind, name, value, "float")
    elif not _INT_MIN <= value <= _INT_MAX:
        raise RequestError("out_of_range", f"{kind}.{name} does not fit 64 bits")


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair, alone
        return False
    return True


def _wrong_type(kind: str, name: str, value: object, want: str) -> RequestError:
    return RequestError(
        "wrong_type", f"{kind}.{name}: expected {want}, got {type(value).__name__} {value!r:.64}"
    )


def unknown(code: str, message: str, known: Iterable[str]) -> RequestError:
    """The error about a word, the first of `message`, that is none of `known`."""
    known = list(known)
    word = message.partition(" ")[0].strip("'").rpartition(".")[2]
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return RequestError(code, message, hint)
