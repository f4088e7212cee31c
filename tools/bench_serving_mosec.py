"""The peer mosec of tools/bench-serving: a worker as mosec's documentation shows one.

Why msgpack and not JSON: mosec answers faster with it, and a peer is measured at its best.
Run by the interpreter of var/peers/mosec; MODEL names the file.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime as ort
from mosec import Server, Worker
from mosec.mixin import MsgpackMixin


class Model(MsgpackMixin, Worker):  # type: ignore[misc]
    """Rows of features in, probabilities out."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(
            os.environ["MODEL"], options, providers=["CPUExecutionProvider"]
        )

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        features = np.asarray(data["features"], dtype=np.float32)
        return {
            "probability": self._session.run(["probability"], {"features": features})[0].tolist()
        }


if __name__ == "__main__":
    server = Server()
    server.append_worker(Model, num=1)
    server.run()
