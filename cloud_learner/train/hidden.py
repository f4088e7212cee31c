"""What a network makes of rows just before it answers: its embeddings.

Why: two worlds may look alike column by column and in their scores, and still not be the same; what
the network itself tells apart shows it (`evaluate.watch`). And it is what the sessions of a device
stand on.

A network that has a method `embed` says itself what its embedding is; of any other it is what goes
into its last linear layer, the last one being the one that runs last.

Invariants: looking changes no weight and draws no random number; the network is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cloud_learner.train.dataset import Matrix
from cloud_learner.train.parts import looked_at


def looked_into(network: nn.Module, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """The network's logits, and its embedding (batch, width); None where it has none.

    It can be exported as it stands.
    """
    if hasattr(type(network), "embed"):  # a method: many a network calls a layer so
        return network(features), network.embed(features)  # type: ignore[operator]
    seen: list[Tensor] = []
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, given: seen.append(given[0]))
        for layer in layers
    ]
    try:
        logits: Tensor = network(features)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, seen[-1] if seen else None


def embeddings_of(network: nn.Module, features: Matrix) -> Matrix | None:
    """The embedding of each row, float32 (rows, width); None where the network has none."""
    found = _undisturbed(network, features, lambda part: _embedding(network, part)[1])
    return found if found.shape[1] else None


def side_by_side(network: nn.Module, features: Matrix) -> Matrix:
    """Logits and embedding of each row, float32 (rows, outputs + width), from one run."""
    return _undisturbed(network, features, lambda part: torch.cat(_embedding(network, part), 1))


def _undisturbed(network: nn.Module, features: Matrix, look: Callable[[Tensor], Tensor]) -> Matrix:
    trained = network.training
    network.eval()
    try:
        with torch.inference_mode():
            return looked_at(network, features, look).numpy().copy()
    finally:
        network.train(trained)


def _embedding(network: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the embedding of shape (batch, width), of width 0 where there is none."""
    logits, embedding = looked_into(network, features)
    if embedding is None or embedding.shape[0] != len(features):
        return logits, torch.empty(len(features), 0)
    return logits, embedding.flatten(1)
