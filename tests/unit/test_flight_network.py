"""The flight family's networks take any spec: indices are embedded, all else is a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_learner.train.modules import load_module
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec

SPEC = Spec.from_toml("""
version = 1
[[features]]
name = "carrier"
field = "carrier"
vocabulary = ["AA", "UA"]
one_hot = true
[[features]]
name = "dest"
field = "dest"
hash = 16
[[features]]
name = "distance"
field = "distance"
bucket = [500.0, 1000.0]
[[features]]
name = "day"
cycle = { of = "day" }
[[features]]
name = "size"
field = "distance"
log1p = true
""")


@pytest.fixture(scope="module")
def rows():
    engine = Engine(SPEC)
    chance = np.random.default_rng(1)
    return np.stack(
        [
            engine.vector(
                float(chance.uniform(0, 1e6)),
                {
                    "carrier": str(chance.choice(["AA", "UA", "ZZ"])),
                    "dest": f"D{chance.integers(40)}",
                    "distance": float(chance.uniform(0, 2000)),
                },
            )
            for _ in range(200)
        ]
    )


@pytest.mark.parametrize("build", ["build_teacher", "build_student"])
def test_a_network_is_built_for_the_columns_of_the_spec(rows, build):
    module = load_module(Path(__file__).parents[2] / "models" / "flight_delay" / "network.py")
    network = getattr(module, build)(SPEC, rows).eval()
    with torch.no_grad():
        logits = network(torch.tensor(rows))
    assert logits.shape == (200, 1)
    assert torch.isfinite(logits).all()
    assert network.words.tolist() == [2, 3]
    assert network.numbers.tolist() == [0, 1, 4, 5, 6]
    assert network.embedding.num_embeddings == 16 + 3
