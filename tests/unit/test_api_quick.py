"""What the loop's thread runs itself: so many rows, so many bytes; the rest runs elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.api.answers import group_end, takes_long
from edge_runtime.api.client import AsyncClient
from edge_runtime.api.frames import Hello, Infer, Observe, Predict, RawTensor, Rollback
from edge_runtime.api.socket import SocketServer
from edge_runtime.device.serving import QUICK_US, ModelInfo
from edge_runtime.runtime import Event, Prediction, Runtime

Stage = Callable[[Runtime, AsyncClient], Awaitable[None]]


def quick(rows: int, row_bytes: int) -> ModelInfo:
    """A model of which the loop's thread may run so many rows at once."""
    return ModelInfo("f", "r1", ("r1",), (), (), rows > 0, True, rows, rows * row_bytes)


def infer(rows: int, columns: int = 2, datatype: str = "FP32") -> Infer:
    raw = RawTensor("x", datatype, (rows, columns), bytes(4 * rows * columns))
    return Infer(1, "f", (raw,))


PREDICT = Predict(1, "f", "k", 1.0, {})


@pytest.mark.parametrize(("rows", "together"), [(1, 1), (3, 3), (10, 10), (11, 10), (1000, 10)])
def test_events_are_answered_together_up_to_the_rows_of_one_short_run(
    rows: int, together: int
) -> None:
    items = [PREDICT] * 10
    assert group_end(items, 0, quick(rows, 8)) == min(rows, together)


def test_each_group_has_as_many_and_begins_where_the_one_before_ends() -> None:
    items, ends = [PREDICT] * 10, [0]
    while ends[-1] < len(items):
        ends.append(group_end(items, ends[-1], quick(4, 8)))
    assert ends == [0, 4, 8, 10]


@pytest.mark.parametrize(("rows", "together"), [(1, 8), (2, 4), (3, 2), (4, 2), (8, 1), (9, 1)])
def test_tensors_are_answered_together_up_to_the_bytes_of_one_short_run(
    rows: int, together: int
) -> None:
    assert group_end([infer(rows)] * 10, 0, quick(8, 8)) == together


@pytest.mark.parametrize(
    ("item", "elsewhere"),
    [
        (infer(8), False),
        (infer(9), True),
        (infer(1, columns=17), True),
        (PREDICT, False),
        (Observe(1, "f", "k", 1.0, {}), False),
        (Hello(1, 1), False),
    ],
)
def test_what_is_more_than_a_short_run_is_run_elsewhere(item: Any, elsewhere: bool) -> None:
    asks = isinstance(item, Infer | Predict)
    assert takes_long(item, quick(8, 8) if asks else None) is elsewhere


@pytest.mark.parametrize("item", [infer(1), PREDICT])
def test_a_heavy_model_is_always_run_elsewhere(item: Any) -> None:
    assert takes_long(item, quick(0, 8))


def test_a_roll_back_is_done_elsewhere() -> None:
    assert takes_long(Rollback(1, "f", "bad"), None)


def play(package: Path, stage: Stage) -> None:
    async def scene() -> None:
        with Runtime.open(package=package) as runtime:
            assert runtime.model("same").inline
            server = SocketServer(runtime, runtime.statistics)
            await server.start(package.parent / "edge.sock")
            try:
                async with await AsyncClient.connect(package.parent / "edge.sock") as client:
                    await asyncio.wait_for(stage(runtime, client), 30)
            finally:
                await server.close()

    asyncio.run(scene())


def jobs(runtime: Runtime) -> int:
    """How many requests ran off the loop's thread."""
    found: int = runtime.statistics()["worker"]["jobs"]
    return found


def numbers(rows: int, columns: int = 3) -> np.ndarray[Any, Any]:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)


def test_a_model_says_how_much_of_it_is_a_short_run(write_model: Callable[..., Path]) -> None:
    with Runtime.open(package=write_model()) as runtime:
        model = runtime.model("same")
        [arm] = runtime._members["same"].pipeline.slot.arms
        assert (
            model.quick_rows * arm.runner.run_us
            <= QUICK_US
            < ((model.quick_rows + 1) * max(arm.runner.run_us, 1.0))
        )
        assert model.quick_bytes == model.quick_rows * 12
    with Runtime.open(package=write_model(only_rows=2)) as runtime:
        model = runtime.model("same")
        assert (model.inline, model.quick_rows, model.quick_bytes) == (False, 0, 0)


def test_many_rows_of_a_light_model_leave_the_loop_alone(
    write_model: Callable[..., Path],
) -> None:
    async def stage(runtime: Runtime, client: AsyncClient) -> None:
        model = runtime.model("same")
        few, many = numbers(model.quick_rows), numbers(model.quick_rows + 1)
        for ran, x in enumerate((few, many)):
            np.testing.assert_array_equal((await client.infer("same", {"x": x}))["y"], x)
            assert jobs(runtime) == ran
            answer = await runtime.infer_async("same", {"x": x})
            np.testing.assert_array_equal(answer["y"], x)
            assert jobs(runtime) == 2 * ran

    play(write_model(), stage)


def test_a_long_row_of_a_light_model_counts_by_its_length(
    write_model: Callable[..., Path],
) -> None:
    async def stage(runtime: Runtime, client: AsyncClient) -> None:
        length = runtime.model("same").quick_bytes // 4
        for ran, x in enumerate((numbers(1, length), numbers(1, length + 1))):
            np.testing.assert_array_equal((await client.infer("same", {"x": x}))["y"], x)
            await runtime.infer_async("same", {"x": x})
            assert jobs(runtime) == 2 * ran

    play(write_model(shape=("batch", "length")), stage)


def test_pipelined_requests_of_a_light_model_get_their_own_answers_in_short_runs(
    write_model: Callable[..., Path],
) -> None:
    async def stage(runtime: Runtime, client: AsyncClient) -> None:
        x = numbers(max(runtime.model("same").quick_rows // 3, 1))
        asks = [client.infer("same", {"x": x + step}) for step in range(100)]
        for step, answer in enumerate(await asyncio.gather(*asks)):
            np.testing.assert_array_equal(answer["y"], x + step)
        assert jobs(runtime) == 0
        assert runtime.counters()["infers"] == 100

    play(write_model(), stage)


def test_many_rows_over_http_leave_the_loop_alone(served: Any) -> None:
    rows = served.runtime.model("same").quick_rows
    for ran, count in enumerate((rows, rows + 1)):
        tensor = {"name": "x", "shape": [count, 3], "datatype": "FP32", "data": [0.5] * (3 * count)}
        status, said = served.json("POST", "/v2/models/same/infer", {"inputs": [tensor]})
        assert (status, said["outputs"][0]["shape"]) == (200, [count, 3])
        assert jobs(served.runtime) == ran


def test_bytes_of_what_is_quick_are_those_of_all_inputs(write_model: Callable[..., Path]) -> None:
    path = write_model(inputs=("x1", "x2"))
    with Runtime.open(package=path) as runtime:
        model = runtime.model("same")
        assert model.quick_bytes == model.quick_rows * 24


class Busy:
    """A service whose one-row runs keep the loop's thread for longer than a short run may."""

    device = "EWR"
    epoch = 1

    def __init__(self) -> None:
        self.turns, self.seen = 0, list[int]()

    def model(self, family: str) -> ModelInfo:
        return quick(1, 8)

    def predict(self, family: str, event: Event) -> Prediction:
        until_s = time.perf_counter() + 2 * QUICK_US / 1e6
        while time.perf_counter() < until_s:
            pass
        self.seen.append(self.turns)
        asyncio.get_running_loop().call_soon(self.turn)
        return Prediction(f"EWR.1.{len(self.seen)}", [0.5], "r1", "stable")

    def turn(self) -> None:
        """Somebody else is served."""
        self.turns += 1


def test_between_the_runs_of_one_client_others_are_served(tmp_path: Path) -> None:
    async def scene() -> None:
        service = Busy()
        server = SocketServer(service, dict)
        await server.start(tmp_path / "edge.sock")
        try:
            async with await AsyncClient.connect(tmp_path / "edge.sock") as client:
                asks = [client.predict("f", "k", float(step), {}) for step in range(20)]
                answers = await asyncio.gather(*asks)
        finally:
            await server.close()
        assert [each.id for each in answers] == [f"EWR.1.{seq}" for seq in range(1, 21)]
        assert service.seen == list(range(20))

    asyncio.run(scene())
