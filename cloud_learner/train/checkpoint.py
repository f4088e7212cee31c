"""Checkpoints: the whole trainable state in one file, and what makes training repeatable.

Invariants: commit point is one rename; a file of another version is refused, never guessed at.
Only our own files are read: the format can carry code.
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


def settle(seed: int) -> None:
    """One torch thread and a known seed: same rows, same bits; answers elsewhere come first."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)


@contextlib.contextmanager
def random_kept() -> Iterator[None]:
    """Torch's random state is afterwards what it was before."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` and torch's random state. Raises: OSError."""
    whole = {"version": CHECKPOINT_VERSION, "torch_random": torch.get_rng_state(), **state}
    write_atomic(path, _written(whole).getvalue())


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
    """What `save` wrote; torch's random state goes on from there.

    Raises: ConfigError `bad_checkpoint`.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=False)
    except Exception as error:
        raise ConfigError("bad_checkpoint", f"{path} cannot be read: {error}") from error
    if state.get("version") != CHECKPOINT_VERSION:
        raise ConfigError("bad_checkpoint", f"{path} has version {state.get('version')}")
    torch.set_rng_state(state["torch_random"])
    return state
