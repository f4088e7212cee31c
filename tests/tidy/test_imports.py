"""Who may import whom: rules 1-4 of ARCHITECTURE.md, read from the source, TYPE_CHECKING included.

`violations` takes a tree of sources and returns one sentence for each import that breaks a rule, so
that each rule can be shown to fail on a small bad tree before it is held against the real one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Bottom to top; a room imports only itself and what stands before it. `rollout.plan` is pure and
# stands apart from its room: trust and shelf judge and keep plans, the agent above drives them.
EDGE_ORDER = (
    *("errors", "clock", "files", "metrics", "memory", "cpus", "logs", "notify", "wire", "tables"),
    *("config", "bus"),
    *("features", "personal", "inference", "events", "rollout.plan", "update", "rollout"),
    *(
        "device",
        "session",
        "tensorial",
        "runtime",
        "factory",
        "api",
        "doctor_broker",
        "doctor",
        "uplinked",
        "daemon",
    ),
    *("local", "cli", ""),
)
STEPS = ("ingest", "train", "package", "evaluate", "release", "rollout")
CLOUD_ORDER = (
    ("config", "exits", "submitted"),
    ("access",),
    ("children", "nats_server", "server_check"),
    ("broker",),
    ("admission", "streams"),
    ("packed", "asking", "orders"),
    ("approvals",),
    ("stats",),
    ("store",),
    STEPS,
    ("rules",),
    ("pooling",),
    ("cycle",),
    ("course", "gate", "publisher", "controller", "floors", "reports", "timekeeper"),
    ("judging", "gate_signing", "pushing", "steering", "auditing", "estimating"),
    ("learner", "releasing"),
    ("gate_home", "gatehouse", "submissions", "consents", "helm"),
    ("host",),
    ("experiment", "console"),
    ("bootstrap", "serve"),
    ("simulate",),
    ("commands", "rollouts"),
    ("cli",),
)
LEARNER_MAY_IMPORT = (
    *("errors", "clock", "files", "metrics", "wire", "bus", "features", "inference"),
    *("personal.prior", "personal.policy", "personal.odds", "personal.head", "personal.moments"),
    *("update.trust", "update.patch", "update.approval", "rollout.plan"),
)
MODELS_MAY_IMPORT = (
    *("cloud_learner.train.blocks", "cloud_learner.train.blocks_text"),
    "cloud_learner.experiment.outside",
    "cloud_learner.train.modules",  # which loads one file of a folder for another
)
# library -> the path prefixes that may import it
HOMES = {
    "torch": ("cloud_learner/train/", "cloud_learner/package/build.py", "models/"),
    "onnx": ("cloud_learner/package/",),
    "onnxscript": ("cloud_learner/package/",),
    "optimum": ("cloud_learner/package/optimum_path.py",),
    "transformers": ("cloud_learner/package/optimum_path.py", "models/"),
    "safetensors": ("cloud_learner/train/blocks_text.py",),
    "onnxruntime": ("edge_runtime/inference/runner.py",),
    "onnxruntime.quantization": ("cloud_learner/package/",),
    "nats": ("edge_runtime/bus/",),
    "tokenizers": ("edge_runtime/features/tokens.py",),
    "httptools": ("edge_runtime/api/http_connection.py",),
    "tuf": ("edge_runtime/update/", "cloud_learner/release/", "cloud_learner/publisher.py"),
    "duckdb": ("cloud_learner/store/", "cloud_learner/experiment/", "models/"),
    "rocksdict": ("cloud_learner/store/rocks.py",),
    "starlette": ("cloud_learner/console/",),
    "river": ("cloud_learner/stats/",),
}
Import = tuple[int, str]


def violations(sources: Mapping[str, str]) -> list[str]:
    """One sentence for each import in `sources` (path -> text) that breaks a rule."""
    modules = {module_of(path) for path in sources}
    found = (
        f"{path}:{line} imports {target}: {reason}"
        for path, text in sorted(sources.items())
        for line, target in imports_of(path, text, modules)
        if (reason := broken_rule(path, target))
    )
    return list(dict.fromkeys(found))


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str, text: str, modules: set[str]) -> Iterator[Import]:
    """Each imported module, however it is imported: plain, from, relative, late or by name."""
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(path, node)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in modules or name in HOMES else base
        elif isinstance(node, ast.Call) and is_import_call(node.func):
            named = (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
            yield from ((node.lineno, str(name)) for name in named)


def absolute_base(path: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = path.removesuffix(".py").split("/")[: -node.level]
    return ".".join([*package, node.module] if node.module else package)


def is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def broken_rule(path: str, target: str) -> str:
    side = path.split("/", maxsplit=1)[0]
    if target == "edge_runtime" or target.startswith("edge_runtime."):
        inner = target.removeprefix("edge_runtime").removeprefix(".")
        if side == "edge_runtime":
            return edge_order(module_of(path).removeprefix("edge_runtime").removeprefix("."), inner)
        return learner_reach(path, inner) if side == "cloud_learner" else ""
    if target == "cloud_learner" or target.startswith("cloud_learner."):
        if side == "models":
            return "" if target in MODELS_MAY_IMPORT else "a family needs no more of the learner"
        if side != "cloud_learner":
            return "the learner imports the device, never the reverse"
        return cloud_order(room_of(module_of(path)), room_of(target))
    return library_home(path, target)


def edge_order(importer: str, target: str) -> str:
    above, below = edge_place(importer), edge_place(target)
    if above is None or below is None:
        unplaced = importer if above is None else target
        return f"{unplaced!r} has no place in EDGE_ORDER of {Path(__file__).name}"
    return "" if below <= above else "a room imports only from rooms below it"


def edge_place(module: str) -> int | None:
    for name in (module, module.split(".", maxsplit=1)[0]):
        if name in EDGE_ORDER:
            return EDGE_ORDER.index(name)
    return None


def learner_reach(path: str, target: str) -> str:
    if path.startswith("cloud_learner/simulate/"):
        return ""
    reachable = any(target == room or target.startswith(f"{room}.") for room in LEARNER_MAY_IMPORT)
    return "" if reachable else f"the learner may import only {' '.join(LEARNER_MAY_IMPORT)}"


def room_of(module: str) -> str:
    return f"{module}.".split(".")[1]


def cloud_order(importer: str, target: str) -> str:
    if importer == target:
        return ""
    above, below = cloud_place(importer), cloud_place(target)
    if above is None or below is None:
        unplaced = importer if above is None else target
        return f"{unplaced!r} has no place in CLOUD_ORDER of {Path(__file__).name}"
    if importer in STEPS and target in STEPS:
        return "the learner's steps never import each other; a root wires them"
    return "" if below <= above else "a room imports only from rooms below it"


def cloud_place(room: str) -> int | None:
    return next((place for place, rooms in enumerate(CLOUD_ORDER) if room in rooms), None)


def library_home(path: str, target: str) -> str:
    """The longest name in HOMES that `target` lies under decides."""
    parts = target.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    homes = next((HOMES[name] for name in names if name in HOMES), None)
    if homes is None or path.startswith(homes):
        return ""
    return f"its home is {' '.join(homes)}"


def real_sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("edge_runtime", "cloud_learner", "models")
        for path in (ROOT / folder).rglob("*.py")
    }


def test_the_tree_keeps_every_rule():
    found = violations(real_sources())

    assert not found, "\n" + "\n".join(found)


def test_the_rules_see_the_tree():
    """Guards the guard: an empty walk would keep every rule."""
    sources = real_sources()
    seen = {
        target
        for path, text in sources.items()
        for _, target in imports_of(path, text, {module_of(path) for path in sources})
    }

    assert {"edge_runtime.errors", "edge_runtime.wire.messages", "msgspec"} <= seen


BAD_TREES = {
    "a lower room imports a higher one": (
        "edge_runtime/bus/base.py",
        "from edge_runtime.events.log import EventLog",
        "a room imports only from rooms below it",
    ),
    "under TYPE_CHECKING too": (
        "edge_runtime/bus/base.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import edge_runtime.runtime",
        "a room imports only from rooms below it",
    ),
    "inside a function too": (
        "edge_runtime/wire/codec.py",
        "def late():\n    from edge_runtime import runtime",
        "a room imports only from rooms below it",
    ),
    "by a relative import too": (
        "edge_runtime/wire/codec.py",
        "from ..features import engine",
        "a room imports only from rooms below it",
    ),
    "the public face from inside": (
        "edge_runtime/api/socket.py",
        "from edge_runtime import Runtime",
        "a room imports only from rooms below it",
    ),
    "a room without a place": (
        "edge_runtime/attic/box.py",
        "from edge_runtime.errors import HeadwaterError",
        "'attic.box' has no place in EDGE_ORDER of test_imports.py",
    ),
    "the device imports the learner": (
        "edge_runtime/daemon.py",
        "from cloud_learner.stats import scores",
        "the learner imports the device, never the reverse",
    ),
    "a family reaches into the learner": (
        "models/flight_delay/network.py",
        "from cloud_learner.train.replica import Replica",
        "a family needs no more of the learner",
    ),
    "the learner reaches into the device": (
        "cloud_learner/ingest/consumer.py",
        "from edge_runtime.events.log import EventLog",
        f"the learner may import only {' '.join(LEARNER_MAY_IMPORT)}",
    ),
    "a step imports a step": (
        "cloud_learner/rollout/campaign.py",
        "from cloud_learner.evaluate.gates import Gate",
        "the learner's steps never import each other; a root wires them",
    ),
    "a step imports a root": (
        "cloud_learner/train/replica.py",
        "import cloud_learner.cycle",
        "a room imports only from rooms below it",
    ),
    "the store imports a step": (
        "cloud_learner/store/archive.py",
        "from cloud_learner import ingest",
        "a room imports only from rooms below it",
    ),
    "torch on a device": (
        "edge_runtime/inference/pipeline.py",
        "import torch.nn as nn",
        "its home is cloud_learner/train/ cloud_learner/package/build.py models/",
    ),
    "torch by name": (
        "cloud_learner/evaluate/offline.py",
        "from importlib import import_module\nimport_module('torch')",
        "its home is cloud_learner/train/ cloud_learner/package/build.py models/",
    ),
    "onnx away from home": (
        "cloud_learner/train/distill.py",
        "import onnx",
        "its home is cloud_learner/package/",
    ),
    "a second home of runners": (
        "cloud_learner/evaluate/offline.py",
        "from onnxruntime import InferenceSession",
        "its home is edge_runtime/inference/runner.py",
    ),
    "the quantizer on a device": (
        "edge_runtime/inference/runner.py",
        "from onnxruntime import quantization",
        "its home is cloud_learner/package/",
    ),
    "nats away from home": (
        "cloud_learner/ingest/consumer.py",
        "from nats.aio.client import Client",
        "its home is edge_runtime/bus/",
    ),
    "tuf away from home": (
        "edge_runtime/rollout/agent.py",
        "from tuf.ngclient import Updater",
        "its home is edge_runtime/update/ cloud_learner/release/ cloud_learner/publisher.py",
    ),
    "duckdb on a device": (
        "edge_runtime/events/log.py",
        "import duckdb",
        "its home is cloud_learner/store/ cloud_learner/experiment/ models/",
    ),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_a_bad_tree_is_refused(case):
    path, text, reason = BAD_TREES[case]
    tree = {
        "edge_runtime/runtime.py": "",
        "edge_runtime/features/engine.py": "",
        "cloud_learner/ingest/__init__.py": "",
        path: text,
    }

    assert [found.split(": ", 1)[1] for found in violations(tree)] == [reason]


GOOD_TREES = {
    "downwards": ("edge_runtime/runtime.py", "from edge_runtime.rollout.plan import Plan"),
    "trust judges plans": ("edge_runtime/update/trust.py", "from edge_runtime.rollout import plan"),
    "the one runner": ("edge_runtime/inference/runner.py", "import onnxruntime as ort"),
    "the quantizer": ("cloud_learner/package/quantize.py", "from onnxruntime import quantization"),
    "a network": ("models/flight_delay/network.py", "from torch import nn"),
    "simulation": ("cloud_learner/simulate/fleet.py", "from edge_runtime import daemon"),
    "a root": ("cloud_learner/learner.py", "from cloud_learner.ingest.joiner import Joiner"),
}


@pytest.mark.parametrize("case", GOOD_TREES)
def test_a_good_tree_is_accepted(case):
    path, text = GOOD_TREES[case]

    assert violations({"edge_runtime/rollout/plan.py": "", path: text}) == []
