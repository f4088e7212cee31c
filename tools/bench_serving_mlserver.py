"""The peer MLServer of tools/bench-serving: a custom runtime, as its documentation advises.

Why custom: MLServer ships none for ONNX. Run by the interpreter of var/peers/mlserver.
"""

from __future__ import annotations

import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):  # type: ignore[misc]
    """Rows of features in, probabilities out."""

    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        features = NumpyCodec.decode_input(payload.inputs[0])
        (answers,) = self._session.run(["probability"], {"features": features})
        outputs = [NumpyCodec.encode_output("probability", answers)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
