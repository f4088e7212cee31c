"""The package: what a device must know of a model, carried in the metadata of its ONNX file.

Why: one file, one hash, one signature; nothing that belongs to a model can be left behind.

Invariants: `read_package(metadata_of(...))` gives back what was written; a package that was read is
whole and agrees with itself: every field that a feature needs is one that the interface declares.

Knows nothing about ONNX: it maps text to text. Implements proto/package.md.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.features.feature import LABEL, Window
from edge_runtime.features.rules import nearest
from edge_runtime.features.spec import Spec
from edge_runtime.inference import buckets, checks
from edge_runtime.inference.checks import FieldType
from edge_runtime.personal.policy import Policy

PACKAGE_VERSION = 1
_NUMBER, _NAME, _TEXT = "a number", "text or an int", "text"
_TYPES = {_NUMBER: ("int", "float"), _NAME: ("str", "int"), _TEXT: ("str",)}
_PREFIX = "headwater."

Matrix = npt.NDArray[np.float32]
T = TypeVar("T")


class Kind(msgspec.Struct, frozen=True):
    """A kind of event: the fields that it must have, and whether it asks for a prediction."""

    predicts: bool
    fields: dict[str, FieldType]


class Interface(msgspec.Struct, frozen=True, dict=True):
    """What an application may say to a family, and what it is told.

    `clock` is what `skew_s_max` is measured against: the newest event, or the machine's time.
    `output` names the value that the model answers with.
    """

    family: str
    kinds: dict[str, Kind]
    clock: Literal["event", "wall"]
    skew_s_max: float
    lateness_s_max: float
    output: str
    version: int = PACKAGE_VERSION

    def check(self, kind: str, time_s: float, fields: Mapping[str, object]) -> None:
        """Refuse an event that is not of this interface; an int will do for a float.

        Raises: RequestError (unknown_kind, unknown_field, missing_field, wrong_type, not_finite,
        out_of_range), naming the field.
        """
        check = self.checks.get(kind)
        if check is None:
            raise checks.unknown(
                "unknown_kind", f"{kind!r:.64} is not a kind of {self.family}", self.kinds
            )
        check(time_s, fields)

    @cached_property
    def checks(self) -> dict[str, checks.Check]:
        """The check of each kind of event, compiled."""
        return {name: checks.compiled(name, kind.fields) for name, kind in self.kinds.items()}


class PackageInfo(msgspec.Struct, frozen=True):
    """What a package says about itself.

    `golden_inputs` (rows, features) gave `golden_outputs` (rows, outputs) where the package was
    made; a device must come within `tolerance` of them before it serves. `policy` is None where
    sessions do not adapt its answers.
    """

    family: str
    interface: Interface
    spec: Spec
    golden_inputs: Matrix
    golden_outputs: Matrix
    tolerance: float
    provenance: dict[str, Any]
    policy: Policy | None = None


class _Golden(msgspec.Struct, frozen=True, omit_defaults=True):
    shape: tuple[int, int]
    inputs_b64: str
    outputs_b64: str
    tolerance: float
    tokens: str = ""


def metadata_of(
    interface: Interface,
    spec: Spec,
    *,
    golden_inputs: Matrix,
    golden_outputs: Matrix,
    tolerance: float,
    provenance: Mapping[str, Any],
    policy: Policy | None = None,
) -> dict[str, str]:
    """The texts to put into an ONNX file's metadata_props. Raises: PackageError, as reading does.

    `provenance` is any JSON object.
    """
    rows, features = golden_inputs.shape
    said = _to_base64(golden_inputs), _to_base64(golden_outputs)
    golden = _Golden((rows, features), *said, tolerance, _tokens_of(spec))
    texts = {
        "family": interface.family,
        "interface": msgspec.json.encode(interface, order="sorted").decode(),
        "features": spec.to_json(),
        "golden": msgspec.json.encode(golden).decode(),
        "provenance": json.dumps(dict(provenance), sort_keys=True),
    }
    if policy is not None:
        texts["personal"] = policy.to_json()
    metadata = {_PREFIX + key: text for key, text in texts.items()} | buckets.noted(spec.padding)
    read_package(metadata)
    return metadata


def read_package(metadata: Mapping[str, str]) -> PackageInfo:
    """What `metadata_of` wrote.

    Raises: PackageError (missing_metadata, bad_metadata, spec_mismatch, missing_extra,
    other_tokens), naming the key.
    """
    interface = _decoded(metadata, "interface", Interface)
    if interface.version != PACKAGE_VERSION:
        raise _bad("interface", f"version {interface.version}; this reads {PACKAGE_VERSION}")
    if interface.family != _text(metadata, "family"):
        raise _bad("family", f"is not the family of the interface, {interface.family!r}")
    try:
        spec = Spec.from_json(_text(metadata, "features"))
    except ConfigError as error:
        if error.code == "missing_extra":
            what = f"the package cannot be used on this machine: {error.message}"
            raise PackageError(error.code, what, error.hint) from error
        raise _bad("features", str(error)) from error
    check_agreement(interface, spec)
    if buckets.padding_in(metadata) not in (None, spec.padding):
        raise _bad("padding", "is not how the rows of its feature spec end")
    golden = _decoded(metadata, "golden", _Golden)
    if golden.tokens not in ("", _tokens_of(spec)):
        what = "the package's tokenizer gives other ids on this machine than where it was built"
        raise PackageError("other_tokens", what, "install the tokenizers library that built it")
    inputs, outputs = _read_golden(golden, spec)
    provenance = _decoded(metadata, "provenance", dict[str, Any])
    told = metadata.get(_PREFIX + "personal")
    policy = None if told is None else Policy.from_json(told)
    return PackageInfo(
        interface.family, interface, spec, inputs, outputs, golden.tolerance, provenance, policy
    )


def _tokens_of(spec: Spec) -> str:
    return "".join(encoder.digest for encoder in spec.encoders.values())


def _text(metadata: Mapping[str, str], key: str) -> str:
    if _PREFIX + key not in metadata:
        raise PackageError(
            "missing_metadata",
            f"the package has no {_PREFIX + key!r} in its metadata",
            "it was not built by Headwater, or its metadata was stripped",
        )
    return metadata[_PREFIX + key]


def _decoded(metadata: Mapping[str, str], key: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(_text(metadata, key), type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _bad(key, str(error)) from error


def _read_golden(golden: _Golden, spec: Spec) -> tuple[Matrix, Matrix]:
    rows, features = golden.shape
    if rows < 1 or features != spec.size:
        raise _bad("golden", f"shape ({rows}, {features}) does not fit {spec.size} features")
    if not 0 <= golden.tolerance < float("inf"):
        raise _bad("golden", f"tolerance {golden.tolerance} is no bound")
    inputs = _from_base64(golden.inputs_b64, "inputs_b64")
    outputs = _from_base64(golden.outputs_b64, "outputs_b64")
    if inputs.size != prod(golden.shape) or not outputs.size or outputs.size % rows:
        raise _bad("golden", "inputs or outputs do not fill their shape")
    if not (np.isfinite(inputs).all() and np.isfinite(outputs).all()):
        raise _bad("golden", "a value is not finite")
    return inputs.reshape(golden.shape), outputs.reshape(rows, -1)


def _to_base64(values: Matrix) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def _from_base64(text: str, key: str) -> Matrix:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    except (binascii.Error, ValueError) as error:
        raise _bad("golden", f"{key}: {error}") from error


def check_agreement(interface: Interface, spec: Spec) -> None:
    """Every field that a feature reads must be one that the events are sure to have.

    Raises: PackageError `spec_mismatch`, naming feature, kind and field.
    """
    predicting = {name: kind for name, kind in interface.kinds.items() if kind.predicts}
    if not predicting:
        raise _mismatch("the interface", "no kind of event asks for a prediction")
    if LABEL in interface.kinds:
        raise _mismatch("the interface", f"{LABEL!r} is what labels are called, not a kind")
    for feature in spec.features:
        if feature.window is not None:
            _check_window(interface, predicting, feature.name, feature.window)
        elif feature.field is not None:
            wanted = _NUMBER if feature.is_number else _NAME if feature.hash is not None else ""
            _check_declared(feature.name, predicting, feature.field, wanted)
        elif feature.lookup is not None:
            _check_declared(feature.name, predicting, feature.lookup.key, _NAME)
        elif feature.tokens is not None:
            _check_declared(feature.name, predicting, feature.tokens.field, _TEXT)


def _check_window(
    interface: Interface, predicting: dict[str, Kind], feature: str, window: Window
) -> None:
    over = {name: kind for name, kind in interface.kinds.items() if name == window.over}
    if not over and window.over != LABEL:
        hint = nearest(window.over, [*interface.kinds, LABEL])
        raise _mismatch(feature, f"{window.over!r} is not a kind of {interface.family}", hint)
    if window.value is not None:
        wanted = "" if window.statistic == "distinct" else _NUMBER
        _check_declared(feature, over, window.value, wanted)
    if window.key is not None:
        _check_declared(feature, over | predicting, window.key)


def _check_declared(feature: str, kinds: dict[str, Kind], field: str, wanted: str = "") -> None:
    """Every one of `kinds` has `field`, and in each it is what is `wanted`, if anything."""
    for name, kind in kinds.items():
        declared = kind.fields.get(field)
        if declared is None:
            why = f"needs {name}.{field}, which the interface does not declare"
            raise _mismatch(feature, why, nearest(field, kind.fields))
        if wanted and declared not in _TYPES[wanted]:
            hint = (
                "words need a `vocabulary` or a `hash`, or in windows `distinct`"
                if wanted == _NUMBER
                else ""
            )
            raise _mismatch(
                feature, f"needs {name}.{field} to be {wanted}; it is a {declared}", hint
            )


def _bad(key: str, why: str) -> PackageError:
    return PackageError("bad_metadata", f"the package's {_PREFIX + key!r} cannot be used: {why}")


def _mismatch(feature: str, why: str, hint: str = "") -> PackageError:
    return PackageError("spec_mismatch", f"feature {feature!r}: {why}", hint)
