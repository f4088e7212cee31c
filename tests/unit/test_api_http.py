"""HTTP: each call of the Open Inference Protocol, asked of a real runtime over a real socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.api.http import HttpServer
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import ConfigError
from edge_runtime.runtime import Runtime

Serve = Callable[..., Any]
WriteModel = Callable[..., Path]
INFER = "/v2/models/same/infer"


def request(array: Any, datatype: str = "FP32", **more: Any) -> Any:
    data = array.ravel().tolist()
    tensor = {"name": "x", "shape": array.shape, "datatype": datatype, "data": data}
    return {"inputs": [tensor], **more}


def test_the_server_says_who_it_is_and_whether_it_is_ready(served: Any) -> None:
    assert served.json("GET", "/v2/health/live") == (200, {"live": True})
    assert served.json("GET", "/v2/health/ready") == (200, {"live": True, "ready": True})
    status, about = served.json("GET", "/v2")
    assert (status, about["name"], about["extensions"]) == (
        200,
        "headwater",
        ["binary_tensor_data"],
    )
    assert served.json("GET", "/v2/") == (200, about)


def test_a_model_says_what_it_takes_and_gives(serve: Serve, write_model: WriteModel) -> None:
    served = serve(write_model("INT64"))
    release = served.runtime.model("same").release

    about = served.json("GET", "/v2/models/same")

    assert about == (
        200,
        {
            "name": "same",
            "versions": [release],
            "platform": "onnx_onnxv1",
            "inputs": [{"name": "x", "datatype": "INT64", "shape": [-1, 3]}],
            "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1, 3]}],
        },
    )
    assert served.json("GET", f"/v2/models/same/versions/{release}") == about
    ready = (200, {"name": "same", "ready": True})
    assert served.json("GET", "/v2/models/same/ready") == ready
    assert served.json("GET", f"/v2/models/same/versions/{release}/ready") == ready
    assert served.json("GET", "/v2/models/same/versions/none/ready")[0] == 404
    assert served.json("GET", "/v2/models/same/versions/none")[0] == 404
    assert served.json("GET", "/v2/models/other/ready")[0] == 404


def test_json_goes_in_and_out(served: Any, floats: Any) -> None:
    release = served.runtime.model("same").release

    answer = served.json("POST", INFER, request(floats, id="q-7"))

    assert answer == (
        200,
        {
            "model_name": "same",
            "model_version": release,
            "id": "q-7",
            "outputs": [
                {
                    "name": "y",
                    "datatype": "FP32",
                    "shape": [2, 3],
                    "data": floats.ravel().tolist(),
                }
            ],
        },
    )
    of_release = f"/v2/models/same/versions/{release}/infer"
    assert served.json("POST", of_release, request(floats, id="q-7")) == answer


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [("BOOL", "?"), ("INT64", "<i8"), ("UINT8", "u1"), ("FP16", "<f2"), ("FP64", "<f8")],
)
def test_binary_goes_in_and_out(
    serve: Serve, write_model: WriteModel, datatype: str, dtype: str
) -> None:
    served = serve(write_model(datatype))
    array = np.array([[1, 0, 1]], dtype=dtype)
    body = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "shape": [1, 3],
                    "datatype": datatype,
                    "parameters": {"binary_data_size": array.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()

    status, headers, content = served.ask(
        "POST",
        INFER,
        body + array.tobytes(),
        {"Inference-Header-Content-Length": str(len(body))},
    )

    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    size = int(headers["inference-header-content-length"])
    assert json.loads(content[:size])["outputs"][0]["parameters"] == {
        "binary_data_size": array.nbytes
    }
    assert content[size:] == array.tobytes()


def test_texts_go_in_and_out(serve: Serve, write_model: WriteModel) -> None:
    served = serve(write_model("BYTES"))
    texts = np.array([["", "é", "two words"]], dtype=object)

    status, answer = served.json("POST", INFER, request(texts, "BYTES"))

    assert status == 200
    assert answer["outputs"][0]["data"] == ["", "é", "two words"]
    assert answer["outputs"][0]["datatype"] == "BYTES"


def test_a_raw_body_is_answered_in_binary(served: Any, floats: Any) -> None:
    status, headers, content = served.ask(
        "POST", INFER, floats.tobytes(), {"Inference-Header-Content-Length": "0"}
    )

    assert status == 200
    assert content[int(headers["inference-header-content-length"]) :] == floats.tobytes()


def test_only_the_outputs_that_are_wanted_are_given(serve: Serve, write_model: WriteModel) -> None:
    served = serve(write_model(inputs=("x", "x2"), shape=(2,)))
    inputs = [
        {"name": name, "shape": [2], "datatype": "FP32", "data": [index, 1]}
        for index, name in enumerate(("x", "x2"))
    ]

    _, answer = served.json("POST", INFER, {"inputs": inputs, "outputs": [{"name": "y2"}]})

    assert answer["outputs"] == [
        {"name": "y2", "datatype": "FP32", "shape": [2], "data": [1.0, 1.0]}
    ]


@pytest.mark.parametrize(
    ("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_body_may_be_compressed(served: Any, floats: Any, encoding: str, encode: Any) -> None:
    body = encode(json.dumps(request(floats)).encode())

    status, answer = served.json("POST", INFER, body, Content_Encoding=encoding)

    assert status == 200
    assert answer["outputs"][0]["data"] == floats.ravel().tolist()


@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({"name": "z"}, 400, "missing_input"),
        ({"datatype": "FP64"}, 400, "wrong_type"),
        ({"shape": [3, 2]}, 400, "wrong_shape"),
        ({"shape": [6]}, 400, "wrong_shape"),
        ({"shape": [0, 3], "data": []}, 400, "empty_batch"),
        ({"shape": [2, 4]}, 400, "bad_request"),
        ({"data": None}, 400, "bad_request"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    served: Any, floats: Any, change: dict[str, Any], status: int, why: str
) -> None:
    body = request(floats)
    body["inputs"][0] |= change

    assert served.json("POST", INFER, body)[0] == status
    assert f"[{why}]" in served.json("POST", INFER, body)[1]["error"]
    assert served.json("POST", INFER, request(floats))[0] == 200


def test_an_output_that_there_is_not_is_refused(
    serve: Serve, write_model: WriteModel, floats: Any
) -> None:
    body = request(floats, outputs=[{"name": "z"}])

    status, said = serve(write_model()).json("POST", INFER, body)

    assert (status, list(said)) == (400, ["error"])
    assert "[unknown_output]" in said["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "why"),
    [
        ("POST", "/v2/models/other/infer", 404, "unknown_family"),
        ("POST", "/v2/models/same/versions/none/infer", 404, "unknown_release"),
        ("GET", "/v2/models/other", 404, "unknown_family"),
        ("GET", INFER, 405, "bad_method"),
        ("PUT", INFER, 405, "bad_method"),
        ("POST", "/v2/health/live", 405, "bad_method"),
        ("POST", "/v2/repository/index", 501, "unsupported"),
        ("GET", "/v2/models/same/stats", 501, "unsupported"),
        ("POST", "/v2/models/same/generate", 501, "unsupported"),
        ("GET", "/v2/systemsharedmemory/status", 501, "unsupported"),
        ("GET", "/v2/models/same/infer/more", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(
    served: Any, method: str, path: str, status: int, why: str
) -> None:
    body = request(np.zeros((1, 3))) if method == "POST" else None

    found, said = served.json(method, path, body)

    assert found == status
    assert why in (said["error"] + said.get("code", ""))


def test_the_name_of_a_model_may_be_escaped_and_followed_by_a_query(
    served: Any, floats: Any
) -> None:
    assert served.json("POST", "/v2/models/s%61me/infer?a=b", request(floats))[0] == 200


def test_a_device_without_a_release_is_live_and_not_ready(tmp_path: Path) -> None:
    config = EdgeConfig(
        device="EWR", families=["toy"], state_dir=tmp_path / "state", socket=tmp_path / "edge.sock"
    )

    async def scene() -> None:
        with Runtime.open(config) as runtime:
            server = HttpServer(runtime, runtime.statistics)
            await server.start(0)
            asked = [
                await asyncio.to_thread(get, server.port, path)
                for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/toy/ready")
            ]
            status, headers = await asyncio.to_thread(head, server.port, "/v2/models/toy")
            await server.close()
        assert asked == [200, 503, 503]
        assert (status, headers["retry-after"]) == (503, "1")

    asyncio.run(scene())


def head(port: int, path: str) -> tuple[int, Any]:
    import http.client

    client = http.client.HTTPConnection("127.0.0.1", port, 10)
    client.request("GET", path)
    response = client.getresponse()
    client.close()
    return response.status, response.headers


def get(port: int, path: str) -> int:
    return head(port, path)[0]


def test_a_port_that_is_taken_is_named(served: Any) -> None:
    second = HttpServer(served.runtime, dict)

    with pytest.raises(ConfigError, match=str(served.port)) as caught:
        asyncio.run(second.start(served.port))
    assert caught.value.code == "port_in_use"


def test_without_the_extra_the_error_says_what_to_install() -> None:
    program = (
        "import asyncio, sys; sys.modules['httptools'] = None\n"
        "from edge_runtime.api.http import HttpServer\n"
        "try: asyncio.run(HttpServer(None, dict).start(0))\n"
        "except Exception as error: print(error.code, error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "http_not_installed pip install 'headwater[http]'\n"


def test_importing_the_server_loads_no_parser() -> None:
    program = "import sys, edge_runtime.api.http; print('httptools' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "False\n"
