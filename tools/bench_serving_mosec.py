"""The peer mosec of tools/bench-serving: workers as mosec's documentation shows them.

Run by the interpreter of var/peers/mosec; MODEL names the file, FORMAT says `json` or `msgpack`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime as ort
from mosec import Server, Worker
from mosec.mixin import MsgpackMixin


class Json(Worker):  # type: ignore[misc]
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


class Msgpack(MsgpackMixin, Json):
    """The same in MessagePack, which is faster."""


if __name__ == "__main__":
    server = Server()
    server.append_worker({"json": Json, "msgpack": Msgpack}[os.environ["FORMAT"]], num=1)
    server.run()
