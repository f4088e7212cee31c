"""Checkpoints: the whole trainable state in one file, and what makes training repeatable.

Invariants: commit point is one rename; a file of another version is refused, never guessed at.
Only our own files are read: the format can carry code. Two users of torch in one process do not
disturb each other's random numbers.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from edge_runtime.errors import ConfigError
from edge_runtime.files import write_atomic

CHECKPOINT_VERSION = 1


class TorchRandom:
    """A stream of torch's random numbers of its own; `state` is where it stands."""

    def __init__(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Torch draws from this stream; afterwards its own goes on as if nothing had happened."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(outer)


def settle(seed: int) -> TorchRandom:
    """One torch thread and a known seed: same rows, same bits; answers elsewhere come first."""
    torch.set_num_threads(1)
    return TorchRandom(seed)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state`. Raises: OSError."""
    write_atomic(path, _written({"version": CHECKPOINT_VERSION, **state}).getvalue())


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same values, sharing nothing with `state`."""
    again: dict[str, Any] = torch.load(_written(state), weights_only=False)
    return again


def _written(state: dict[str, Any]) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote. Raises: ConfigError `bad_checkpoint`."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=False)
        version = state.get("version")
    except Exception as error:
        raise ConfigError("bad_checkpoint", f"{path} cannot be read: {error}") from error
    if version != CHECKPOINT_VERSION:
        raise ConfigError(
            "bad_checkpoint", f"{path} has version {version}; this reads {CHECKPOINT_VERSION}"
        )
    return state
