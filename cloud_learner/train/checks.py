"""What family.toml and features.toml must keep to beyond their single keys, and with each other.

Why: a field that a feature misspells, or a share that nobody can reach, is found here, before
anything is trained; all of it at once.

Invariants: what is noted names file and key, or feature and key. A feature that is wrong does not
hide what is wrong with the next.

Knows nothing about networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cloud_learner.train.declaration import FamilyConfig
from cloud_learner.train.problems import EXAMPLE, Problems, bad
from cloud_learner.train.tables import expanded
from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.features.rules import nearest
from edge_runtime.features.spec import Spec, parse_toml
from edge_runtime.inference.package import Interface, check_agreement
from edge_runtime.wire.subjects import checked_name

COLUMNS = ("event_time", "kind", "device", "label", "label_time")
"""What a data file says of every row; no field may have such a name."""


def check_rules(path: Path, config: FamilyConfig, problems: Problems) -> None:
    """Note what no key alone can say."""
    try:
        checked_name(config.name, f"{path}: name")
    except ConfigError as error:
        problems.add(error)
    for what, hint in _broken_rules(config):
        problems.add(bad(path, what, hint))


def _broken_rules(config: FamilyConfig) -> Iterator[tuple[str, str]]:
    learning, label = config.learning, config.label
    if not any(kind.predicts for kind in config.events.values()):
        yield "no kind in `events` has predicts = true", EXAMPLE
    for name, kind in config.events.items():
        for field in sorted(set(COLUMNS) & set(kind.fields)):
            yield f"events.{name}.fields.{field}: is a column of every data file", "rename it"
    if learning.device_cap > learning.batch_size:
        yield "learning.device_cap is larger than learning.batch_size", EXAMPLE
    if label.policy == "weighted" and not 0 < label.early_s < label.window_s:
        hint = "label.policy = 'weighted' learns labels that come within early_s"
        yield f"label.early_s: {label.early_s} is not between 0 and label.window_s", hint
    if config.gates.calibration_min > config.gates.calibration_max:
        yield "gates.calibration_min is larger than gates.calibration_max", EXAMPLE
    if config.personal is not None and config.task.outputs > 1:
        what = f"personal: a session shifts one number, {config.task.kind} answers with more"
        yield what, "leave [personal] out; sessions are for binary, regression and ranking"
    if config.package.exporter == "optimum" and find_spec("optimum") is None:
        what = "package.exporter: 'optimum' is not installed"
        yield what, "pip install 'headwater[transformers]'"
    yield from _unknown_fields(config)


def _unknown_fields(config: FamilyConfig) -> Iterator[tuple[str, str]]:
    """Slices, and where windows begin, are of some kind that predicts; a group is of each."""
    asking = {name: kind.fields for name, kind in config.events.items() if kind.predicts}
    fields = [field for declared in asking.values() for field in declared]
    for field in config.gates.slices:
        if field not in fields:
            yield (
                f"gates.slices: {field!r} is no field of {', '.join(asking)}",
                nearest(field, fields),
            )
    for key, group in (("task", config.task.group), ("personal", config.session_field)):
        for kind, declared in asking.items():
            if group and group not in declared:
                yield f"{key}.group: {group!r} is no field of {kind}", nearest(group, declared)
    ahead = config.label.window_field
    if ahead and ahead not in fields:
        what = f"label.window_field: {ahead!r} is no field of {', '.join(asking)}"
        yield what, nearest(ahead, fields)
    if any(declared.get(ahead) == "str" for declared in asking.values()):
        yield f"label.window_field: {ahead!r} is text", "it says how many seconds, in a number"


def read_specs(path: Path, problems: Problems) -> list[Spec]:
    """The spec of the file; where it is wrong as a whole, one for each feature that is right."""
    try:
        document = parse_toml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problems.add(bad(path, f"cannot be read: {error}"))
        return []
    except ConfigError as error:
        problems.add(_within(path, error))
        return []
    for part in ("tables", "tokenizers"):
        if isinstance(document.get(part), dict):
            document[part] = _with_files(path, part, document[part], problems)
    try:
        return [Spec.from_document(document)]
    except ConfigError as error:
        return _by_feature(path, document, _within(path, error), problems)


def _with_files(path: Path, part: str, named: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """The tables, or tokenizers, with what their files hold, but for those whose file is wrong."""
    whole: dict[str, Any] = {}
    for name, each in named.items():
        try:
            whole |= expanded({part: {name: each}}, path.parent)[part]
        except ConfigError as error:
            problems.add(_within(path, error))
    return whole


def _by_feature(
    path: Path, document: dict[str, Any], whole: ConfigError, problems: Problems
) -> list[Spec]:
    """Each feature by itself; `whole` is what is wrong if none of them is."""
    specs, before = [], len(problems.found)
    features = document.get("features")
    for number, table in enumerate(features if isinstance(features, list) else [], 1):
        try:
            specs.append(Spec.from_document({**document, "features": [table]}))
        except ConfigError as error:
            error.message = error.message.replace("feature '#1'", f"feature '#{number}'")
            problems.add(_within(path, error))
    if len(problems.found) == before:
        problems.add(whole)
    return specs


def check_fields(path: Path, interface: Interface, specs: list[Spec], problems: Problems) -> None:
    """Note each feature that reads a field which its events do not have."""
    for spec, feature in ((each, feature) for each in specs for feature in each.features):
        try:
            check_agreement(interface, Spec([feature], spec.tables, spec.tokenizers))
        except PackageError as error:
            problems.add(bad(path, error.message, error.hint or EXAMPLE))


def _within(path: Path, error: ConfigError) -> ConfigError:
    return ConfigError(error.code, f"{path}: {error.message}", error.hint)
