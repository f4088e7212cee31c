"""The packages of tools/bench-updates: students a micro-batch apart, and a model of many megabytes.

Why: how much two releases differ is a matter of how a network learns, so it has to have learned.

Invariants: January's flights before, then micro-batches of 500 in the order of the flights; a large
model is a package like any other, with golden rows of its own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cloud_learner.bootstrap import labelled_rows
from cloud_learner.cycle import Candidate, Cycle
from cloud_learner.package.seal import sealed
from cloud_learner.store.examples import Batch, Example
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module

FOLDER = Path(__file__).resolve().parents[1] / "models" / "flight_delay"
FAMILY = "flight_delay"
BATCH_ROWS = 500
DEVICES = ("EWR", "JFK", "LGA")
START_S = 1_360_000_000.0


@cache
def flights(folder: Path) -> tuple[Family, Rows, Rows]:
    """The family, the flights of January, and those of February."""
    data = folder / "flights.parquet"
    load_module(FOLDER / "data.py").write_data(data, "2013-03-01")
    family = Family.load(FOLDER)
    found, _ = labelled_rows(family, data)
    rows = Rows(found.features, found.labels)
    cut = len(rows) * 31 // 59
    return family, rows.take(np.arange(cut)), rows.take(np.arange(cut, len(rows)))


@cache
def students(folder: Path, count: int) -> list[Candidate]:
    """So many candidates, each a micro-batch after the one before it."""
    family, learned, later = flights(folder)
    cycle = Cycle(family, learned.features[:5000])
    cycle.pretrain(learned)
    found = [cycle.candidate()]
    for number in range(1, count):
        cycle.learn(Batch(number, _examples(family, later, (number - 1) * BATCH_ROWS)))
        found.append(cycle.candidate())
    return found


def _examples(family: Family, rows: Rows, start: int) -> list[Example]:
    return [
        Example(
            device=DEVICES[at % len(DEVICES)],
            epoch=1,
            seq=at,
            family=FAMILY,
            time_s=START_S + at,
            label_time_s=START_S + at,
            features=rows.features[at].astype("<f4").tobytes(),
            spec=family.spec.hash,
            label=float(rows.labels[at]),
            propensity=1.0,
            scored=[],
            arrived_s=START_S + at,
            matured_s=START_S + at,
        )
        for at in range(start, start + BATCH_ROWS)
    ]


def large(megabytes: int) -> bytes:
    """A package of so many megabytes of float32 weights."""
    family, random = Family.load(FOLDER), np.random.default_rng(4)
    width, columns = int((megabytes * 250_000) ** 0.5), family.spec.size
    weights = {
        "first": random.normal(0, 0.1, (columns, width)),
        "middle": random.normal(0, 1 / width, (width, width)),
        "last": random.normal(0, 0.1, (width, 1)),
    }
    nodes = [
        helper.make_node("MatMul", ["features", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "middle"], ["c"]),
        helper.make_node("MatMul", ["c", "last"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    golden = random.normal(size=(2, columns)).astype(np.float32)
    return sealed(model, family.interface, family.spec, golden, {"form": "large"})
