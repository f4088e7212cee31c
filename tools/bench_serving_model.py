"""The model of tools/bench-serving: one ONNX file for the device, the floor and the peers.

Why: numbers compare only when everything runs the same bytes. The file is a family's package, which
the device predicts with; others see an ordinary model of 32 inputs, two layers and a free batch.

Invariants: same arguments, same bytes and same events. A `lean` above zero pushes all answers of a
package above one half, one below zero pushes them below, so that nobody can take one for the other.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from cloud_learner.package.seal import sealed
from edge_runtime.features.feature import Cycle, Feature, Window
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface, Kind
from edge_runtime.personal.policy import Policy
from edge_runtime.runtime import Event

FAMILY = "bench"
HIDDEN = 64
START_S = 1_360_000_000.0
CARRIERS = [f"carrier-{number}" for number in range(15)]
DESTINATIONS = [f"airport-{number}" for number in range(12)]

# Over what is asked and what is observed, over all and by two keys.
WINDOWS = [
    Window("asked", "count", 300),
    Window("asked", "count", 3600),
    Window("asked", "count", 3600, key="carrier"),
    Window("asked", "mean", 3600, key="dest", value="distance"),
    Window("landed", "count", 3600),
    Window("landed", "mean", 3600, value="delay"),
    Window("landed", "std", 3600, value="delay"),
    Window("landed", "max", 3600, value="delay"),
    Window("landed", "distinct", 3600, value="gate"),
    Window("landed", "mean", 3600, key="carrier", value="delay"),
    Window("landed", "mean", 10800, key="carrier", value="delay"),
    Window("landed", "decayed_mean", half_life_s=1800, key="dest", value="delay"),
]
SPEC = Spec(
    [
        Feature("carrier", field="carrier", vocabulary=CARRIERS, one_hot=True),
        Feature("dest", field="dest", vocabulary=DESTINATIONS),
        Feature("distance", field="distance", bounds=(0.0, 5000.0)),
        Feature("hour", field="hour"),
        Feature("day", cycle=Cycle("day")),
        *(Feature(f"window-{number}", window=each) for number, each in enumerate(WINDOWS, 1)),
    ]
)
INTERFACE = Interface(
    family=FAMILY,
    kinds={
        "asked": Kind(
            predicts=True,
            fields={"carrier": "str", "dest": "str", "distance": "float", "hour": "int"},
        ),
        "landed": Kind(
            predicts=False,
            fields={"carrier": "str", "dest": "str", "delay": "float", "gate": "int"},
        ),
    },
    clock="event",
    skew_s_max=86400.0,
    lateness_s_max=600.0,
    output="late",
)

Matrix = npt.NDArray[np.float32]


def rows(count: int, seed: int = 1) -> Matrix:
    """Inputs of the model, (count, columns)."""
    values = np.random.default_rng(seed).uniform(-1, 1, (count, SPEC.size))
    return values.astype(np.float32)


def write_package(path: Path, lean: float = 0.0, policy: Policy | None = None) -> Path:
    """Write the model with all that a device must know of it. With a `policy`, the last hidden
    layer is its embedding.
    """
    chance = np.random.default_rng(1)
    weights = {
        "w1": chance.normal(size=(SPEC.size, HIDDEN)) / 100,
        "b1": chance.normal(size=HIDDEN),
        "w2": chance.normal(size=(HIDDEN, 1)) / 100,
        "b2": np.array([lean]),
    }
    outputs = {"probability": 1} | ({} if policy is None else {"embedding": HIDDEN})
    hidden = "a" if policy is None else "embedding"
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["features", "w1", "b1"], ["h"]),
            helper.make_node("Tanh", ["h"], [hidden]),
            helper.make_node("Gemm", [hidden, "w2", "b2"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], ["probability"]),
        ],
        FAMILY,
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", SPEC.size])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
            for name, size in outputs.items()
        ],
        [numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(sealed(model, INTERFACE, SPEC, rows(8), {"lean": lean}, policy=policy))
    return path


class Stream:
    """Seeded events; time goes on by `step_s` with each question, by a second with others.

    Who asks many questions lets some observations come first, so that no window empties.
    """

    def __init__(self, step_s: float = 0.1, seed: int = 1) -> None:
        self._chance = random.Random(seed)  # noqa: S311 - data, not secrets
        self._time_s, self._step_s = START_S, step_s

    def questions(self, count: int) -> list[Event]:
        """The next events that ask for a prediction."""
        return [
            self._event("asked", self._step_s, distance=self._number(100, 3000), hour=number % 24)
            for number in range(count)
        ]

    def observations(self, count: int) -> list[Event]:
        """The next events that are only observed."""
        return [
            self._event("landed", 1.0, delay=self._number(-20, 90), gate=number % 40)
            for number in range(count)
        ]

    def _event(self, kind: str, later_s: float, **fields: float) -> Event:
        self._time_s += later_s
        names = {
            "carrier": self._chance.choice(CARRIERS),
            "dest": self._chance.choice(DESTINATIONS),
        }
        return Event(kind, self._time_s, names | fields)

    def _number(self, low: float, high: float) -> float:
        return round(self._chance.uniform(low, high), 1)
