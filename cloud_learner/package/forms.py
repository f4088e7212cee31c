"""The two forms of a candidate: from a student's network to sealed packages, int8 and float32.

Why: what is exported, quantized, learned of sessions and sealed, in this order, is one way, and
whoever learns must go no other.

Invariants: same network, rows and facts give the same bytes. Both forms carry the policy that was
learned on the embedding of the int8 form. A kept graph that gives no embedding where one is needed,
or one where none is, is exported anew.

Knows nothing about learning, nor what a policy says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from cloud_learner.package.build import Exporter, Graph, Look
from cloud_learner.package.dynamic import quantized_by_row
from cloud_learner.package.quantize import quantized
from cloud_learner.package.seal import runner_of, sealed
from cloud_learner.stats.tasks import Task
from edge_runtime.features.spec import Spec
from edge_runtime.inference.buckets import noted
from edge_runtime.inference.package import Interface
from edge_runtime.inference.runner import Runner
from edge_runtime.personal.policy import Policy

EXAMPLE_ROWS = 64
GOLDEN_ROWS = 8

Ranges = Literal["static", "dynamic"]
Matrix = npt.NDArray[np.float32]


class Forms:
    """Makes packages of one family's students, which are torch modules of one architecture.

    `reference` (rows, features) are usual rows. With `look`, packages give the embedding that it
    sees. int8 takes its ranges from rows, or (`dynamic`) from each row that it meets.
    """

    def __init__(
        self,
        interface: Interface,
        spec: Spec,
        task: Task,
        reference: Matrix,
        look: Look | None,
        *,
        exporter: Exporter = "torch",
        ranges: Ranges = "static",
    ) -> None:
        self._interface, self._spec, self._task = interface, spec, task
        self._reference, self._look = reference, look
        self._exporter, self._ranges = exporter, ranges
        self._graph: Graph | None = None

    def keep(self, network: Any, path: Path) -> None:
        """Write the graph, so that a restart need not export again. Raises: OSError."""
        self._exported(network).save(path)

    def take(self, path: Path) -> None:
        """Use the graph that `keep` wrote. Raises: OSError, PackageError."""
        graph = Graph.load(path)
        self._graph = graph if graph.embeds == (self._look is not None) else None

    def of(
        self,
        network: Any,
        rows: Matrix,
        facts: Mapping[str, Any],
        policy: Callable[[Runner], Policy | None],
    ) -> tuple[bytes, bytes]:
        """The int8 package and the float32 one; static ranges are those of `rows`.

        Raises: PackageError.
        """
        plain = self._exported(network).package(network, noted(self._spec.padding))
        int8 = quantized(plain, rows) if self._ranges == "static" else quantized_by_row(plain)
        learned = policy(runner_of(int8)) if self._look is not None else None
        first, second = (
            self._sealed(model, {**facts, "form": form}, learned)
            for form, model in (("int8", int8), ("float32", plain))
        )
        return first, second

    def _sealed(self, model: ModelProto, facts: Mapping[str, Any], policy: Policy | None) -> bytes:
        golden = self._reference[:GOLDEN_ROWS]
        return sealed(model, self._interface, self._spec, golden, facts, policy=policy)

    def _exported(self, network: Any) -> Graph:
        if self._graph is None:
            example = self._reference[:EXAMPLE_ROWS]
            self._graph = Graph(
                network,
                example,
                self._task,
                self._look,
                exporter=self._exporter,
                is_text=self._spec.padding is not None,
            )
        return self._graph
