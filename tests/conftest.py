"""What tests share: a family so small that its answers can be worked out by hand, its packages as
real files; one that reads texts; a family that can be learned in a second, with its data; and one
profile for generated tests: the same examples in each run, no deadlines.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings

from edge_runtime.events.segment import SUFFIX
from edge_runtime.features.spec import Spec
from edge_runtime.files import OsFiles
from edge_runtime.inference.package import Interface, Kind, metadata_of
from edge_runtime.inference.runner import Runner
from edge_runtime.personal.policy import Policy

settings.register_profile("house", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("house")

with contextlib.suppress(ImportError):  # Optimum and transformers leave a thread behind otherwise
    import tqdm

    tqdm.tqdm.monitor_interval = 0

TOY_FEATURES = """
version = 1
[[features]]
name = "carrier"
field = "carrier"
vocabulary = ["AA", "UA"]
[[features]]
name = "distance"
field = "distance"
bounds = [0.0, 6000.0]
[[features]]
name = "seen_1h"
window = { over = "departed", statistic = "count", span_s = 3600.0 }
[[features]]
name = "delay_1h"
fill = -1.0
window = { over = "departed", value = "delay", statistic = "mean", span_s = 3600.0 }
[[features]]
name = "carrier_delay_1e4s"
window = { over = "departed", key = "carrier", value = "delay", statistic = "sum", span_s = 1e4 }
"""


@pytest.fixture
def toy_spec() -> Spec:
    return Spec.from_toml(TOY_FEATURES)


@pytest.fixture
def toy_interface() -> Interface:
    return Interface(
        family="toy",
        kinds={
            "scheduled": Kind(predicts=True, fields={"carrier": "str", "distance": "float"}),
            "departed": Kind(predicts=False, fields={"carrier": "str", "delay": "float"}),
        },
        clock="event",
        skew_s_max=86400.0,
        lateness_s_max=7200.0,
        output="late",
    )


@pytest.fixture
def write_package(
    tmp_path: Path, toy_spec: Spec, toy_interface: Interface
) -> Callable[..., tuple[Path, str]]:
    """`write_package(bias=...)` writes a package that answers sigmoid(bias + sum(x) / 1000).

    Returns its path and SHA-256. `model_bias` makes the model differ from its golden answers, which
    follow `bias`; `drop` leaves a metadata key out, `columns` changes the model's width alone,
    `ballast` adds 4 * ballast**2 bytes of weights that change no answer. With a `policy` the model
    also gives an embedding: the features times `turn` / 1000, cut or filled to the prior's width.
    Its provenance has `facts` beside the bias.
    """

    def write(
        bias: float = 0.0,
        *,
        spec: Spec = toy_spec,
        interface: Interface = toy_interface,
        model_bias: float | None = None,
        drop: str = "",
        columns: int | None = None,
        ballast: int = 0,
        policy: Policy | None = None,
        turn: float = 1.0,
        facts: Mapping[str, object] = {},
    ) -> tuple[Path, str]:
        inputs = np.linspace(-3, 100, 4 * spec.size, dtype=np.float32).reshape(4, -1)
        logits = inputs.sum(1, keepdims=True) / 1000 + bias
        outputs = (1 / (1 + np.exp(-logits))).astype(np.float32)
        metadata = metadata_of(
            interface,
            spec,
            golden_inputs=inputs,
            golden_outputs=outputs,
            tolerance=1e-5,
            provenance={"bias": bias, **facts},
            policy=policy,
        )
        metadata.pop(drop, None)
        actual_bias = bias if model_bias is None else model_bias
        width = 0 if policy is None else policy.prior.width
        embedding = turn / 1000 * np.eye(columns or spec.size, width)
        model = _model(actual_bias, metadata, ballast, embedding)
        sha256 = hashlib.sha256(model).hexdigest()
        path = tmp_path / f"{sha256}.onnx"
        path.write_bytes(model)
        return path, sha256

    return write


def _model(bias: float, metadata: dict[str, str], ballast: int, embedding: Any) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    columns, width = embedding.shape
    weights = {"w": np.full((columns, 1), 1 / 1000), "b": np.array([bias])}
    nodes = [helper.make_node("Gemm", ["features", "w", "b"], ["logit"])]
    if ballast:
        shapes = ((columns, ballast), (ballast, ballast), (ballast, 1))
        weights |= {f"z{i}": np.zeros(shape) for i, shape in enumerate(shapes)}
        nodes += [
            helper.make_node("MatMul", ["features", "z0"], ["y0"]),
            helper.make_node("MatMul", ["y0", "z1"], ["y1"]),
            helper.make_node("MatMul", ["y1", "z2"], ["y2"]),
            helper.make_node("Add", ["logit", "y2"], ["sum"]),
        ]
    nodes.append(helper.make_node("Sigmoid", [nodes[-1].output[0]], ["probability"]))
    outputs = {"probability": 1}
    if width:
        weights["e"] = embedding
        nodes.append(helper.make_node("MatMul", ["features", "e"], ["embedding"]))
        outputs["embedding"] = width
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", columns])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
            for name, size in outputs.items()
        ],
        [numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *["my", "card", "is", "lost", "when", "will", "it", "come", "where", "?", "##s"],
)


def _tokenizer(words: Sequence[str], model: dict[str, Any], added: list[dict[str, Any]]) -> str:
    """The JSON of a tokenizer of BERT's kind; the first words are [PAD], [UNK], [CLS], [SEP]."""
    vocabulary = {word: at for at, word in enumerate(words)}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
            "decoder": None,
            "model": {**model, "vocab": vocabulary},
        },
        separators=(",", ":"),
    )


TOKENIZER = _tokenizer(
    WORDS,
    {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    | {"max_input_chars_per_word": 100},
    [
        {"id": at, "content": word, "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for at, word in enumerate(WORDS[:4])
    ],
)
WITHOUT_TOKENIZERS = """
import sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tokenizers":
            raise ImportError("No module named 'tokenizers'")

sys.meta_path.insert(0, Gone())
"""
SAID = "", "my card is lost", "when will it come ?", "cards " * 40, "where"
TEXT_INTERFACE = Interface(
    family="intent",
    kinds={"asked": Kind(predicts=True, fields={"text": "str"})},
    clock="event",
    skew_s_max=86400.0,
    lateness_s_max=0.0,
    output="intent",
)


@pytest.fixture
def text_interface() -> Interface:
    return TEXT_INTERFACE


# One layer of attention over embedded tokens and their places; `pooled` are means over tokens.
_READS = """<ir_version: 8, opset_import: ["": 17]>
reads (float[n,{columns}] features) => (float[n,{scores}] probability{more}) {{
    ids = Cast <to = 7> (features)
    none = Constant <value = int64 {{{pad}}}> ()
    empty = Equal (ids, none)
    said = Not (empty)
    mask = Cast <to = 1> (said)
    one = Constant <value = int64[1] {{1}}> ()
    two = Constant <value = int64[1] {{2}}> ()
    zero = Constant <value = int64[1] {{0}}> ()
    shape = Shape (ids)
    length = Gather (shape, one)
    places = Slice (place, zero, length, zero)
    words = Gather (table, ids)
    x = Add (words, places)
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    kt = Transpose <perm = [0, 2, 1]> (k)
    raw = MatMul (q, kt)
    big = Constant <value = float {{1e9}}> ()
    less = Sub (mask, unit)
    off = Mul (less, big)
    row = Unsqueeze (off, one)
    masked = Add (raw, row)
    weight = Softmax <axis = -1> (masked)
    mixed = MatMul (weight, x)
    column = Unsqueeze ({mask}, two)
    kept = Mul (mixed, column)
    total = ReduceSum <keepdims = 0> (kept, one)
    count = ReduceSum <keepdims = 0> (column, one)
    pooled = Div (total, count)
    every = ReduceMean <axes = [1], keepdims = 0> (mixed)
    logits = MatMul (pooled, w)
    probability = {answer} (logits)
    {given}
}}"""


@pytest.fixture
def text_spec() -> Callable[..., Spec]:
    """`text_spec(length=32)` is one text as token ids."""

    def made(length: int = 32, tokenizer: str = TOKENIZER) -> Spec:
        tokens = {"field": "text", "tokenizer": "tiny", "length": length}
        document = {"version": 1, "features": [{"name": "text", "tokens": tokens}]}
        return Spec.from_document(document | {"tokenizers": {"tiny": tokenizer}})

    return made


@pytest.fixture
def write_text_package(
    tmp_path: Path, text_spec: Callable[..., Spec]
) -> Callable[..., tuple[Path, str]]:
    """`write_text_package(length=32)` writes a package that reads texts by attention, 3 classes.

    Returns its path and SHA-256. Padding has the weight `leaky` in the mean, and golden answers the
    tolerance of real packages then; a `heavy` one of many columns takes milliseconds; `words` is
    how many its table of embeddings has; `fixed` fixes its columns; `off` is added to the golden
    answers, which are to what is `said`. `also` are outputs of width 8: the `pooled` mean over
    tokens, or that over `every` column. With a `policy` it answers with one number.
    """

    def write(
        length: int = 32,
        *,
        leaky: float = 0.0,
        heavy: bool = False,
        words: int = len(WORDS),
        fixed: bool = False,
        off: float = 0.0,
        tokenizer: str = TOKENIZER,
        said: Sequence[str] = SAID,
        also: Mapping[str, str] = {},
        policy: Policy | None = None,
        family: str = "intent",
    ) -> tuple[Path, str]:
        from onnx import helper, numpy_helper, parser

        from cloud_learner.package.seal import TOLERANCE

        spec = text_spec(length, tokenizer)
        rows = np.stack([np.float32(spec.encoders["text"](text)) for text in said])
        columns = length if fixed else "s"
        scores, answer = (3, "Softmax <axis = -1>") if policy is None else (1, "Sigmoid")
        text = _READS.format(
            columns=columns,
            pad=0,
            mask="all" if leaky else "mask",
            scores=scores,
            answer=answer,
            more="".join(f", float[n,8] {name}" for name in also),
            given="\n".join(f"{name} = Identity ({what})" for name, what in also.items()),
        )
        if leaky:
            part = f"part = Constant <value = float {{{leaky}}}> ()"
            some = f"    {part}\n    all = Max (mask, part)\n"
            text = text.replace("    column =", f"{some}    column =")
        if heavy:
            steps = [f"r{n} = Asinh (r{n - 1})" for n in range(1, 9)]
            text = text.replace("raw = MatMul (q, kt)", "\n".join(["r0 = MatMul (q, kt)", *steps]))
            text = text.replace("Add (raw, row)", "Add (r8, row)")
        model = parser.parse_model(text)
        chance = np.random.default_rng(3)
        weights = {
            "table": chance.normal(size=(words, 8)),
            "place": chance.normal(size=(512, 8)),
            "wq": chance.normal(size=(8, 8)),
            "wk": chance.normal(size=(8, 8)),
            "w": chance.normal(size=(8, scores)),
            "unit": np.array(1.0),
        }
        model.graph.initializer.extend(
            numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()
        )
        golden = (
            _golden_of(model, rows, tmp_path)
            if words == len(WORDS)
            else np.zeros((len(said), scores), "f4")
        )
        metadata = metadata_of(
            msgspec.structs.replace(TEXT_INTERFACE, family=family),
            spec,
            golden_inputs=rows,
            golden_outputs=golden + np.float32(off),
            tolerance=TOLERANCE if leaky else 1e-5,
            provenance={},
            policy=policy,
        )
        helper.set_model_props(model, metadata)
        data = model.SerializeToString()
        sha256 = hashlib.sha256(data).hexdigest()
        path = tmp_path / f"{sha256}.onnx"
        path.write_bytes(data)
        return path, sha256

    return write


def _golden_of(model: Any, rows: Any, folder: Path) -> Any:
    path = folder / "bare.onnx"
    path.write_bytes(model.SerializeToString())
    answers = Runner(path).infer({"features": rows})
    path.unlink()
    return answers["probability"]


COIN_FAMILY = """
name = "coin"
output = "heads"

[events.asked]
predicts = true
fields = { side = "str", x = "float" }

[events.seen]
fields = { y = "float" }

[label]
window_s = 20.0

[learning]
batch_size = 50
device_cap = 30
seed = 7
bootstrap_passes = 3
reservoir_rows = 400

[learning.fast]
window_rows = 100

[learning.stable]
replay_rows = 100

[learning.student]
replay_rows = 100

[gates]
static_drop_max = 0.3
recent_drop_max = 0.5
quality_min = 0.6
int8_gap_max = 0.05
calibration_min = 0.2
calibration_max = 5.0
recent_rows_min = 2

[rollout]
selector = { site = "a" }
"""
COIN_FEATURES = """
version = 1
[[features]]
name = "side"
field = "side"
vocabulary = ["left", "right"]
[[features]]
name = "x"
field = "x"
bounds = [-10.0, 10.0]
[[features]]
name = "seen"
window = { over = "seen", value = "y", statistic = "mean", span_s = 30.0 }
"""
COIN_NETWORK = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, spec, rows, dropout):
        super().__init__()
        self.register_buffer("mean", torch.tensor(rows).mean(0))
        self.register_buffer("std", torch.tensor(rows).std(0) + 1e-6)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(spec.size, 1)
        nn.init.constant_(self.out.weight, 0.3)

    def forward(self, features):
        return self.out(self.drop((features - self.mean) / self.std))


def build_teacher(spec, rows):
    return Network(spec, rows, 0.2)


def build_student(spec, rows):
    return Network(spec, rows, 0.0)
"""


@pytest.fixture(scope="session")
def coin() -> types.SimpleNamespace:
    """A family that learns in a second: heads is likelier the larger x is; `seen` tells nothing.

    `write_family(folder, {"family.toml": (old, new), ...})` writes its folder, each file with one
    part replaced; new None leaves the file out. `stream(rows, seed, start_s)` are events in time
    order as (time_s, kind, device, fields, label or None, label_time_s or None): one a second from
    the devices a and b in turns of four, each fourth only observed, labels known five seconds
    later. `write_csv(path, events)` makes a data file of them.
    """
    files = {
        "family.toml": COIN_FAMILY,
        "features.toml": COIN_FEATURES,
        "network.py": COIN_NETWORK,
    }

    return types.SimpleNamespace(
        write_family=partial(_write_folder, files), stream=_coins, write_csv=_write_csv
    )


def _write_folder(
    files: dict[str, str],
    folder: Path,
    changes: dict[str, tuple[str, str | None]] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        old, new = (changes or {}).get(name, ("", ""))
        assert old in text, old
        if new is not None:
            (folder / name).write_text(text.replace(old, new, 1))
    return folder


def _coins(rows: int, seed: int = 1, start_s: float = 1000.0) -> list[tuple[Any, ...]]:
    random = np.random.default_rng(seed)
    events: list[tuple[Any, ...]] = []
    for index in range(rows):
        time_s, device, x = start_s + index, "ab"[index // 4 % 2], float(random.normal())
        if index % 4 == 3:
            events.append((time_s, "seen", device, {"y": x}, None, None))
            continue
        fields = {"side": ("left", "right")[int(random.integers(2))], "x": x}
        heads = float(random.random() < 1 / (1 + np.exp(-4 * x)))
        events.append((time_s, "asked", device, fields, heads, time_s + 5))
    return events


def _write_csv(
    path: Path, events: list[tuple[Any, ...]], columns: Sequence[str] = ("side", "x", "y")
) -> Path:
    lines = [",".join(("event_time", "kind", "device", *columns, "label", "label_time"))]
    for time_s, kind, device, fields, label, label_time_s in events:
        cells = [_utc(time_s), kind, device, *(fields.get(name) for name in columns)]
        cells += [label, _utc(label_time_s)]
        lines.append(",".join("" if cell is None else str(cell) for cell in cells))
    path.write_text("\n".join(lines) + "\n")
    return path


def _utc(time_s: float | None) -> str | None:
    return None if time_s is None else datetime.fromtimestamp(time_s, UTC).isoformat()


@pytest.fixture(scope="session")
def coin_graph(coin: types.SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported graph of the coin family's student; exporting takes seconds."""
    from cloud_learner.package.build import Graph
    from cloud_learner.train.family import Family

    folder = tmp_path_factory.mktemp("graph")
    rows = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    family = Family.load(coin.write_family(folder))
    Graph(family.build_student(rows), rows).save(folder / "graph.onnx")
    return folder / "graph.onnx"


TASTE_FAMILY = """
name = "taste"
output = "liked"

[events.shown]
predicts = true
fields = { visit = "str", a = "float", b = "float", c = "float" }

[label]
window_s = 60.0

[learning]
batch_size = 60
device_cap = 60
seed = 7
bootstrap_passes = 12
reservoir_rows = 2000

[gates]
static_drop_max = 0.3
recent_drop_max = 0.5
quality_min = 0.55
int8_gap_max = 0.05
calibration_min = 0.2
calibration_max = 5.0
recent_rows_min = 2

[personal]
region = 4.0
group = "visit"
memory = 60

[rollout]
selector = { site = "a" }
"""
TASTE_FEATURES = "version = 1\n" + "".join(
    f'[[features]]\nname = "{name}"\nfield = "{name}"\nbounds = [-10.0, 10.0]\n' for name in "abc"
)
TASTE_NETWORK = """
from cloud_learner.train.blocks import Network


def build_teacher(spec, rows):
    return Network(spec, rows, hidden=(32, 16))


def build_student(spec, rows):
    return Network(spec, rows, hidden=(16, 8))
"""


@pytest.fixture(scope="session")
def taste() -> types.SimpleNamespace:
    """A family whose visitors differ: what is liked depends on a, b, c and on whose visit it is.

    `write_family(folder, changes)` writes its folder as that of `coin`. `visits(count, seed,
    start_s)` are events in time order, as `coin.stream` has them, of so many visits to the devices
    a to d in turns: 8 to 20 events each, 10 seconds apart, labels known five seconds later.
    `write_csv(path, events)` makes a data file of them.
    """
    files = {
        "family.toml": TASTE_FAMILY,
        "features.toml": TASTE_FEATURES,
        "network.py": TASTE_NETWORK,
    }
    return types.SimpleNamespace(
        write_family=partial(_write_folder, files),
        visits=_visits,
        write_csv=partial(_write_csv, columns=("visit", "a", "b", "c")),
    )


def _visits(count: int, seed: int = 1, start_s: float = 1000.0) -> list[tuple[Any, ...]]:
    random, events = np.random.default_rng(seed), list[tuple[Any, ...]]()
    for number in range(count):
        bias, (likes, shuns) = random.normal(0, 1), random.normal(0, 1.5, 2)
        begin_s = start_s + 50.0 * number
        for place in range(int(random.integers(8, 21))):
            a, b, c = (float(x) for x in random.normal(size=3))
            odds = a - np.tanh(b) + bias + likes * np.tanh(c) + shuns * np.tanh(a + b)
            time_s, liked = begin_s + 10.0 * place, float(random.logistic(odds) > 0)
            fields = {"visit": f"v{seed}-{number}", "a": a, "b": b, "c": c}
            events.append((time_s, "shown", "abcd"[number % 4], fields, liked, time_s + 5))
    return sorted(events, key=lambda event: event[0])


class BadDisk(OsFiles):
    """A real disk of which the syncs of segments fail with `error` while there is one, or with EIO
    for so many `failures`, or hang until `free` is set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.error = self.failures = 0
        self.calls = 0
        self.free = threading.Event()
        self.free.set()
        self.asked = threading.Event()
        self._segments: set[int] = set()

    def create(self, path: Path, mode: int = 0o600) -> int:
        fd = super().create(path, mode)
        if path.suffix == SUFFIX:
            self._segments.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self._segments.discard(fd)
        super().close(fd)

    def sync(self, fd: int) -> None:
        if fd in self._segments:
            self.asked.set()
            self.free.wait()
            self.calls += 1
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, "no")
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
        super().sync(fd)


@pytest.fixture
def bad_disk() -> BadDisk:
    """A disk that can be told to refuse, or to hang."""
    return BadDisk()


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[[Sequence[str]], str]:
    """`word_tokenizer(words)`: the JSON of a tokenizer to which each of these words is a token."""
    return lambda words: _tokenizer(words, {"type": "WordLevel", "unk_token": "[UNK]"}, [])


@pytest.fixture
def without_tokenizers(tmp_path: Path) -> Path:
    """A folder: a process with it first in PYTHONPATH cannot import the library tokenizers."""
    folder = tmp_path / "without-tokenizers"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT_TOKENIZERS)
    return folder


@pytest.fixture(scope="session")
def write_bert() -> Callable[[Path, dict[str, Any], float], dict[str, tuple[int, ...]]]:
    """`write_bert(folder, config, spread)` writes a checkpoint of BERT's with random weights, as
    transformers does; the shapes of its tensors by name.
    """

    def write(folder: Path, config: dict[str, Any], spread: float) -> dict[str, tuple[int, ...]]:
        numpy_files = pytest.importorskip("safetensors.numpy")
        random, shapes = np.random.default_rng(1), dict(_bert_shapes(config))
        tensors = {
            name: (random.normal(0, spread, shape) + ("LayerNorm.weight" in name)).astype("<f4")
            for name, shape in shapes.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        numpy_files.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return shapes

    return write


def _bert_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    rows = (config["vocab_size"], config["max_position_embeddings"], 2)
    for name, count in zip(("word", "position", "token_type"), rows, strict=True):
        yield f"embeddings.{name}_embeddings.weight", (count, width)
    linear = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (width, width), "intermediate.dense": (inner, width)}
    linear |= {"output.dense": (width, inner)}
    layers = [f"encoder.layer.{at}" for at in range(config["num_hidden_layers"])]
    ends = ("attention.output.LayerNorm", "output.LayerNorm")
    norms = ("embeddings.LayerNorm", *(f"{layer}.{end}" for layer in layers for end in ends))
    weights = {f"{layer}.{name}": shape for layer in layers for name, shape in linear.items()}
    for name, shape in {**weights, **dict.fromkeys(norms, (width,))}.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]
