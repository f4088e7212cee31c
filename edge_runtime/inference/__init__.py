"""One ONNX file to answers: the package, its runner, the slot it serves in, and the pipeline."""
