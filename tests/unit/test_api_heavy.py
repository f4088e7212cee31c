"""A model too heavy for the loop's thread, behind a real socket and a real runtime."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import uvloop
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.api.client import AsyncClient
from edge_runtime.api.socket import SocketServer
from edge_runtime.errors import CapacityError, RequestError
from edge_runtime.runtime import Runtime

COLUMNS, LAYERS = 1000, 10
Stage = Callable[[Runtime, SocketServer, Path], Awaitable[None]]


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    """A file whose model turns a row ten times: what it answers is the row, ten places on."""
    turn = np.roll(np.eye(COLUMNS, dtype=np.float32), 1, axis=1)
    names = ["x", *[f"y{number}" for number in range(1, LAYERS)], "y"]
    nodes = [
        helper.make_node("MatMul", [before, "turn"], [after])
        for before, after in itertools.pairwise(names)
    ]
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", COLUMNS])],
        [numpy_helper.from_array(turn, "turn")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "heavy.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def play(package: Path, stage: Stage) -> None:
    async def scene() -> None:
        with Runtime.open(package=package) as runtime:
            assert not runtime.model("heavy").inline
            server = SocketServer(runtime, runtime.statistics)
            await server.start(package.parent / "edge.sock")
            try:
                await asyncio.wait_for(stage(runtime, server, package.parent / "edge.sock"), 30)
            finally:
                await server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


def row(number: int) -> np.ndarray:
    return np.arange(number, number + COLUMNS, dtype=np.float32)[np.newaxis]


def test_answers_are_right_and_in_order_while_others_are_served(heavy: Path) -> None:
    """Others are answered long before the heavy ones are done."""

    async def stage(_runtime: Runtime, _server: SocketServer, path: Path) -> None:
        async with (
            await AsyncClient.connect(path) as client,
            await AsyncClient.connect(path) as other,
        ):
            futures = [client.infer("heavy", {"x": row(number)}) for number in range(200)]
            await other.status()
            while not futures[0].done():
                await other.hello()
            assert not futures[-1].done()
            for number, answer in enumerate(await asyncio.gather(*futures)):
                np.testing.assert_array_equal(answer["y"], np.roll(row(number), LAYERS))

    play(heavy, stage)


def test_more_than_the_queue_holds_is_refused_and_may_be_sent_again(heavy: Path) -> None:
    async def stage(_runtime: Runtime, _server: SocketServer, path: Path) -> None:
        clients = [await AsyncClient.connect(path) for _ in range(4)]
        futures = [
            client.infer("heavy", {"x": row(number)}) for client in clients for number in range(120)
        ]
        found = await asyncio.gather(*futures, return_exceptions=True)
        refused = [each for each in found if isinstance(each, CapacityError)]
        assert {error.code for error in refused} == {"overloaded"}
        assert 0 < len(refused) < len(found)
        assert (await clients[0].infer("heavy", {"x": row(1)}))["y"].shape == (1, COLUMNS)
        for client in clients:
            await client.close()

    play(heavy, stage)


def test_a_wrong_request_for_it_fails_alone(heavy: Path) -> None:
    async def stage(_runtime: Runtime, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            right = client.infer("heavy", {"x": row(1)})
            wrong = client.infer("heavy", {"x": row(1)[:, 1:]})
            event = client.predict("heavy", "kind", 1.0, {})
            last = client.infer("heavy", {"x": row(2)})
            with pytest.raises(RequestError, match="wrong_shape"):
                await wrong
            with pytest.raises(RequestError, match="no_features"):
                await event
            for answer in (await right, await last):
                assert answer.release

    play(heavy, stage)
