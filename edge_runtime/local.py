"""Local mode: one ONNX file served on the first day: no broker, no keys, no learner, no settings.

Why: whoever has a model can ask it within a minute, and is told how.

Invariants: what is told can be copied and works as long as it serves. The state lies in a temporary
folder and ends with the process.

Knows nothing of how things are served: it writes a configuration and lets the daemon run it.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from edge_runtime import daemon
from edge_runtime.config import HttpConfig
from edge_runtime.device.restart import temporary_config
from edge_runtime.inference.onnxfile import metadata_in
from edge_runtime.inference.package import read_package
from edge_runtime.inference.tensors import Tensor
from edge_runtime.runtime import ModelInfo, Runtime

CELLS_MAX = 64
_SAMPLES: dict[str, Any] = {"str": "", "int": 0, "float": 0.0}


def run(package: Path, socket: Path, http_port: int | None, say: Callable[[str], None]) -> None:
    """Serve `package` until SIGTERM or SIGINT; `say` is told how to ask as soon as it answers.

    Raises: ConfigError (also bad_package, for a file that is no model) before anything is served.
    """

    def tell(runtime: Runtime) -> None:
        say(how_to_ask(package, runtime.model(runtime.families[0]), socket, http_port))

    with temporary_config(package, socket=socket, http=HttpConfig(port=http_port)) as config:
        daemon.run(config, tell)


def how_to_ask(package: Path, model: ModelInfo, socket: Path, http_port: int | None) -> str:
    """What is served, and commands that ask it."""
    lines = [f"{package} is served as {model.family}, release {model.release}"]
    lines += [f"  input   {_told(each)}" for each in model.inputs]
    lines += [f"  output  {_told(each)}" for each in model.outputs]
    at = f"--socket {shlex.quote(str(socket))}"
    lines += ["ask it:", f"  edge-runtime status {at}"]
    if model.predicts:
        event = shlex.quote(_event(package))
        lines.append(f"  edge-runtime predict {model.family} {event} {at}")
    lines.append(f"  {shlex.quote(sys.executable)} -c {shlex.quote(_script(model, socket))}")
    if http_port is not None:
        url = f"http://127.0.0.1:{http_port}/v2/models/{model.family}"
        lines.append(f"  curl -s {url}")
        if _is_short(model):
            lines.append(f"  curl -s {url}/infer -d {shlex.quote(_request(model))}")
    return "\n".join(lines)


def _told(tensor: Tensor) -> str:
    return f"{tensor.name} {tensor.datatype} {list(tensor.shape)}"


def _event(package: Path) -> str:
    """An event of the first kind that predicts, as the family's own package declares it."""
    kinds = read_package(metadata_in(package)).interface.kinds
    name, kind = next((name, kind) for name, kind in kinds.items() if kind.predicts)
    fields = {field: _SAMPLES[each] for field, each in kind.fields.items()}
    return json.dumps({"kind": name, "time_s": int(time.time()), "fields": fields})


def _script(model: ModelInfo, socket: Path) -> str:
    arrays = ", ".join(
        f'{_quoted(each.name)}: np.full({_shape(each)}, {_cell(each)!r}, "{each.dtype.str}")'
        for each in model.inputs
    )
    return (
        "import numpy as np; from edge_runtime.api.client import Client; "
        f'print(dict(Client({_quoted(str(socket))}).infer("{model.family}", {{{arrays}}})))'
    )


def _quoted(text: str) -> str:
    """As a literal in double quotes, which a shell's single ones leave alone."""
    return json.dumps(text, ensure_ascii=False)


def _is_short(model: ModelInfo) -> bool:
    """Whether an example fits into a line of JSON, which has no half floats."""
    cells = sum(prod(_shape(each)) for each in model.inputs)
    return cells <= CELLS_MAX and all(each.datatype != "FP16" for each in model.inputs)


def _request(model: ModelInfo) -> str:
    inputs = [
        {
            "name": each.name,
            "shape": _shape(each),
            "datatype": each.datatype,
            "data": [_cell(each)] * prod(_shape(each)),
        }
        for each in model.inputs
    ]
    return json.dumps({"inputs": inputs})


def _cell(tensor: Tensor) -> Any:
    """Nothing, as an element of that type."""
    return "" if tensor.datatype == "BYTES" else tensor.dtype.type(0).item()


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """A shape that fits; free dimensions are 1."""
    return tuple(1 if size < 0 else size for size in tensor.shape)
