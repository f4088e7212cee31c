"""A family: one model line, declared in a folder and loaded by its path.

Why: what differs from one model line to the next stands in three files, so that no package of
Headwater knows any of them.

Invariants: a family that was loaded is whole: its sections are valid, its features name fields that
its event kinds have, its network file defines what it must. Every error names file and key, and one
that is raised tells of all that could be found in the three files.

Knows nothing about data, training or releases. Implements the family folder of DESIGN's surfaces.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cloud_learner.train.checks import check_fields, check_rules, read_specs
from cloud_learner.train.declaration import FamilyConfig, Learning
from cloud_learner.train.hidden import embeddings_of, looked_into
from cloud_learner.train.modules import line_of, load_module
from cloud_learner.train.parts import looked_at
from cloud_learner.train.problems import Problems, bad, read_toml
from edge_runtime.errors import ConfigError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface, Kind
from edge_runtime.personal.prior import WIDTH_MAX

Rows = npt.NDArray[np.float32]

BUILDERS = ("build_teacher", "build_student")
TRIED_ROWS = 500
"""So many rows, from all over the data, are answered by a network that was just built."""


class Family:
    """A loaded family; `spec` may be a part of what features.toml declares."""

    def __init__(self, folder: Path, config: FamilyConfig, spec: Spec, network: ModuleType) -> None:
        self.folder, self.config, self.spec, self._network = folder, config, spec, network

    @classmethod
    def load(cls, folder: Path) -> Family:
        """Read the folder. Raises: ConfigError naming file and key of every problem."""
        if not (folder / "family.toml").is_file():
            raise ConfigError(
                "no_family", f"{folder} holds no family.toml", "give the path of a family folder"
            )
        problems = Problems(folder)
        config = read_toml(folder / "family.toml", FamilyConfig, problems)
        if config is not None:
            check_rules(folder / "family.toml", config, problems)
        specs = read_specs(folder / "features.toml", problems)
        network = _network(folder / "network.py", problems)
        if config is not None and any(kind.predicts for kind in config.events.values()):
            check_fields(folder / "features.toml", _interface(config), specs, problems)
        problems.settle()
        assert config is not None
        assert network is not None
        return cls(folder, config, specs[0], network)

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
        network = self._built("build_student", rows)
        if self.config.personal is not None:
            self._check_embedding(network, rows)
        return network

    def networks(self, rows: Rows) -> tuple[nn.Module, nn.Module]:
        """Teacher and student, of embeddings as wide where one is to follow the other's.

        Raises: ConfigError.
        """
        teacher, student = self.build_teacher(rows), self.build_student(rows)
        if self.config.learning.student.embedding:
            seen = [embeddings_of(each, rows[:2]) for each in (teacher, student)]
            widths = [0 if each is None else each.shape[1] for each in seen]
            if 0 in widths or widths[0] != widths[1]:
                raise bad(
                    self.folder / "network.py",
                    "embeddings of teacher and student are {} and {} numbers wide".format(*widths),
                    "learning.student.embedding pulls one to the other: make them alike, or it 0",
                )
        return teacher, student

    def constants(self, rows: Rows) -> list[str]:
        """The columns that are the same in all rows: nothing can be learned from them.

        A text's marks and padding are none.
        """
        same, columns = (rows == rows[:1]).all(0), self.spec.columns
        named = zip(columns, same.tolist(), strict=True)
        return [column.name for column, constant in named if constant and column.pad is None]

    def _built(self, name: str, rows: Rows) -> nn.Module:
        path, outputs = self.folder / "network.py", self.config.task.outputs
        if not len(rows):
            raise ConfigError(
                "too_few_rows",
                f"{path}: {name}: there are no rows to take scales from",
                "label.window_s may be longer than the data that it has to wait for",
            )
        tried = rows[:: -(-len(rows) // TRIED_ROWS)]
        try:
            network: nn.Module = getattr(self._network, name)(self.spec, rows)
            if not isinstance(network, nn.Module):
                raise TypeError(f"{network!r:.40} is not a torch module")  # noqa: TRY301
            with torch.no_grad():
                answers = looked_at(network.eval(), tried, network)
                shape, finite = tuple(answers.shape), bool(torch.isfinite(answers).all())
        except Exception as error:
            raise bad(path, f"{name} fails{line_of(path, error)}: {error!r}") from error
        if shape != (len(tried), outputs):
            wanted = f"({len(tried)}, {outputs})"
            raise bad(
                path,
                f"{name}: answers to {len(tried)} rows have shape {shape}, not {wanted}",
                f"a network returns logits (batch, {outputs}): {self.config.task.kind}",
            )
        if not any(weight.requires_grad for weight in network.parameters()):
            raise bad(path, f"{name}: the network has no weight that could learn")
        if not finite:
            hint = "take scales from rows, and let no constant column divide by 0"
            raise bad(path, f"{name}: answers to rows of the data are not all finite", hint)
        return network

    def _check_embedding(self, network: nn.Module, rows: Rows) -> None:
        path = self.folder / "network.py"
        try:
            with torch.no_grad():
                _, embedding = looked_into(network, torch.tensor(rows))
        except Exception as error:
            where = line_of(path, error)
            raise bad(path, f"build_student: embed fails{where}: {error!r}") from error
        if embedding is None or not _can_carry_heads(embedding, len(rows)):
            shape = None if embedding is None else tuple(embedding.shape)
            raise bad(
                path,
                f"build_student: embeddings of {len(rows)} rows are of shape {shape}, or not all"
                f" finite float32; wanted ({len(rows)}, 1 to {WIDTH_MAX})",
                "sessions ([personal]) stand on what goes into the last linear layer, or on what"
                " a method embed(features) gives",
            )

    @property
    def name(self) -> str:
        """The family's name, as in subjects, plans and packages."""
        return self.config.name

    @property
    def interface(self) -> Interface:
        """What a device must know to take this family's events."""
        return _interface(self.config)


def _interface(config: FamilyConfig) -> Interface:
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


def _can_carry_heads(embedding: torch.Tensor, rows: int) -> bool:
    shape = tuple(embedding.shape)
    fits = len(shape) == 2 and shape[0] == rows and 0 < shape[1] <= WIDTH_MAX
    return fits and embedding.dtype == torch.float32 and bool(torch.isfinite(embedding).all())


def _network(path: Path, problems: Problems) -> ModuleType | None:
    try:
        module = load_module(path)
    except ConfigError as error:
        problems.add(error)
        return None
    for name in BUILDERS:
        if not callable(getattr(module, name, None)):
            hint = f"def {name}(spec, rows): ..., a torch module"
            problems.add(bad(path, f"defines no function {name}", hint))
    return module
