"""What a data file asks of its devices: all its predictions as arrays, with what became known.

Why: an experiment plays a file many times; it is read, and its features are computed, once.

Invariants: rows are in the order of the file, which is that of time. Features are those of
prediction time, by the device's engine, unlabelled predictions among them.

Knows nothing about joining or learning.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.experiment.features import featured
from cloud_learner.experiment.replay import read_rows
from cloud_learner.train.dataset import Matrix
from cloud_learner.train.family import Family
from edge_runtime.wire.messages import Fields

Floats = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]


class Asked(msgspec.Struct, frozen=True):
    """All predictions of a file; arrays share the first dimension.

    `labels` and `known_s` are NaN where the outcome never became known; `fields` holds those that
    the task or the label window asks for, and is empty where neither does. `start_s` and `end_s`
    are the times of the first and the last that is known.
    """

    devices: list[str]
    times_s: Floats
    known_s: Floats
    features: Matrix
    labels: Matrix
    fields: list[Fields]
    start_s: float
    end_s: float

    def __len__(self) -> int:
        return len(self.labels)

    def shuffled(self, seed: int) -> Asked:
        """The same outcomes with their features, each at the time of another prediction.

        What an answer depends on is then alike at all times. A label takes as long as it did.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        return msgspec.structs.replace(
            self,
            known_s=self.times_s + (self.known_s - self.times_s)[order],
            features=self.features[order],
            labels=self.labels[order],
            fields=[self.fields[at] for at in order] if self.fields else [],
        )


def read_asked(family: Family, data: Path) -> Asked:
    """All predictions of the file with their features. Raises: ConfigError, RequestError."""
    config, interface = family.config, family.interface
    named = config.task.group, config.label.window_field, config.session_field
    wanted = [name for name in named if name]
    found, fields, vectors = [], [], []
    start_s = end_s = math.nan
    for row, vector in featured(
        read_rows(data, interface, task=config.task),
        interface,
        family.spec,
        unlabelled=True,
    ):
        start_s = row.time_s if math.isnan(start_s) else start_s
        end_s = row.time_s
        if vector is None:
            continue
        known_s = math.nan if row.label_time_s is None else row.label_time_s
        label = math.nan if row.label is None else row.label
        found.append((sys.intern(row.device), row.time_s, known_s, label))
        vectors.append(vector)
        if wanted:
            fields.append({name: row.fields[name] for name in wanted if name in row.fields})
    devices, times_s, known, labels = zip(*found, strict=True) if found else ((), (), (), ())
    features = np.stack(vectors) if vectors else np.zeros((0, family.spec.size), np.float32)
    all_known_s = np.array(known, np.float64)
    end_s = max([end_s, *(each for each in known if not math.isnan(each))])
    return Asked(
        list(devices),
        np.array(times_s, np.float64),
        all_known_s,
        features,
        np.array(labels, np.float32),
        fields,
        start_s,
        end_s,
    )
