"""A family: one model line, declared in a folder and loaded by its path.

Why: what differs from one model line to the next stands in three files, so that no package of
Headwater knows any of them.

Invariants: a family that was loaded is whole: its sections are valid, its features name fields that
its event kinds have, its network file defines what it must. Every error names file and key.

Knows nothing about data, training or releases. Implements the family folder of DESIGN's surfaces.
"""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cloud_learner.train.declaration import FamilyConfig, Learning
from cloud_learner.train.tables import expanded
from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.features.spec import Spec, parse_toml
from edge_runtime.inference.package import Interface, Kind, check_agreement
from edge_runtime.wire.subjects import checked_name

Rows = npt.NDArray[np.float32]


class Family:
    """A loaded family; `spec` may be a part of what features.toml declares."""

    def __init__(self, folder: Path, config: FamilyConfig, spec: Spec, network: ModuleType) -> None:
        self.folder, self.config, self.spec, self._network = folder, config, spec, network

    @classmethod
    def load(cls, folder: Path) -> Family:
        """Read the folder. Raises: ConfigError naming file and key."""
        if not (folder / "family.toml").is_file():
            raise ConfigError(
                "no_family", f"{folder} holds no family.toml", "give the path of a family folder"
            )
        config = _config(folder / "family.toml")
        spec = _spec(folder / "features.toml")
        family = cls(folder, config, spec, _network(folder / "network.py"))
        try:
            check_agreement(family.interface, spec)
        except PackageError as error:
            raise _bad(folder / "features.toml", error.message) from error
        return family

    def restricted(self, names: list[str]) -> Family:
        """The same family with only the named features."""
        return Family(self.folder, self.config, self.spec.subset(names), self._network)

    def learning_otherwise(self, learning: Learning) -> Family:
        """The same family with another schedule of learning."""
        return self.declared_otherwise(msgspec.structs.replace(self.config, learning=learning))

    def declared_otherwise(self, config: FamilyConfig) -> Family:
        """The same features and networks under another family.toml."""
        return Family(self.folder, config, self.spec, self._network)

    def build_teacher(self, rows: Rows) -> nn.Module:
        """The cloud's network, its scaling taken from the rows. Raises: ConfigError."""
        return self._built("build_teacher", rows)

    def build_student(self, rows: Rows) -> nn.Module:
        """The device's network, its scaling taken from the rows. Raises: ConfigError."""
        return self._built("build_student", rows)

    def _built(self, name: str, rows: Rows) -> nn.Module:
        path, few = self.folder / "network.py", torch.tensor(rows[:2])
        try:
            network: nn.Module = getattr(self._network, name)(self.spec, rows)
            with torch.no_grad():
                shape = tuple(network.eval()(few).shape)
        except Exception as error:
            raise _bad(path, f"{name} fails: {error!r}") from error
        wanted = (len(few), self.config.task.outputs)
        if shape != wanted:
            raise _bad(path, f"{name}: answers to {len(few)} rows have shape {shape}, not {wanted}")
        return network

    @property
    def name(self) -> str:
        """The family's name, as in subjects, plans and packages."""
        return self.config.name

    @property
    def interface(self) -> Interface:
        """What a device must know to take this family's events."""
        config = self.config
        return Interface(
            family=config.name,
            kinds={
                name: Kind(predicts=kind.predicts, fields=dict(kind.fields))
                for name, kind in config.events.items()
            },
            clock=config.clock,
            skew_s_max=config.skew_s_max,
            lateness_s_max=config.lateness_s_max,
            output=config.output,
        )


def _config(path: Path) -> FamilyConfig:
    try:
        config = msgspec.convert(tomllib.loads(path.read_text("utf-8")), FamilyConfig)
    except (ValueError, OSError) as error:  # of TOML, of a section, of UTF-8
        raise _bad(path, str(error)) from error
    checked_name(config.name, f"{path}: name")
    if not any(kind.predicts for kind in config.events.values()):
        raise _bad(path, "no kind in `events` has predicts = true")
    if config.learning.device_cap > config.learning.batch_size:
        raise _bad(path, "learning.device_cap is larger than learning.batch_size")
    return config


def _spec(path: Path) -> Spec:
    try:
        document = parse_toml(path.read_text("utf-8"))
        return Spec.from_document(expanded(document, path.parent))
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(path, f"cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(error.code, f"{path}: {error.message}", error.hint) from error


def load_module(path: Path) -> ModuleType:
    """A Python file of a family folder, imported by its path. Raises: ConfigError."""
    name = f"family_{path.parent.name}_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None or not path.is_file():
        raise _bad(path, "does not exist")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise _bad(path, f"cannot be imported: {error!r}") from error
    return module


def _network(path: Path) -> ModuleType:
    module = load_module(path)
    for name in ("build_teacher", "build_student"):
        if not callable(getattr(module, name, None)):
            raise _bad(path, f"defines no function {name}")
    return module


def _bad(path: Path, what: str) -> ConfigError:
    return ConfigError("bad_family", f"{path}: {what}", "see models/flight_delay for an example")
