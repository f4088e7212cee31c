"""Tensors in, tensors out: what a runtime answers to who needs neither features nor log.

Why: other servers' clients ask so, and a model without metadata can be asked no other way.

Threads: every method may be called from any thread, and they run side by side.

Knows nothing about events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_runtime.device.serving import ModelInfo, Serving
from edge_runtime.errors import HeadwaterError
from edge_runtime.inference.tensors import Array


class Tensorial:
    """The part of a runtime that answers to tensors, by `_serving`."""

    _serving: Serving

    def infer(
        self,
        family: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        release: str | None = None,
    ) -> dict[str, Array]:
        """What a model answers to tensors: no features, no log. All outputs, or those named.

        `release` None: the stable one. A NaN goes in as it is.
        Raises: RequestError (unknown_family, no_release, unknown_release, missing_input,
        unknown_input, unknown_output, wrong_type, wrong_shape, empty_batch), PackageError.
        """
        return self._serving.infer(family, inputs, outputs or (), release)

    async def infer_async(
        self,
        family: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        release: str | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Array]:
        """As `infer`, without stalling the event loop however heavy the model is. Raises: as
        `infer`, and CapacityError (overloaded, deadline_exceeded).
        """
        return await self._serving.infer_async(family, inputs, outputs or (), release, timeout_s)

    def infer_many(
        self,
        family: str,
        requests: Sequence[Mapping[str, Array]],
        outputs: Sequence[str] | None = None,
        *,
        release: str | None = None,
    ) -> list[dict[str, Array] | HeadwaterError]:
        """The answers to `requests`, in order, with one run of the model where its rows allow it;
        errors in their places. Raises: RequestError (unknown_family, no_release, unknown_release).
        """
        return self._serving.infer_many(family, requests, outputs or (), release)

    def model(self, family: str) -> ModelInfo:
        """What a family serves. Raises: RequestError (unknown_family, no_release)."""
        return self._serving.model(family)
