"""What a network makes of rows just before it answers: its embeddings.

Why: two worlds may look alike column by column and in their scores, and still not be the same; what
the network itself tells apart shows it (`evaluate.watch`).

Invariants: looking changes no weight and draws no random number; the network is left as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cloud_learner.train.dataset import Matrix


def embeddings_of(network: nn.Module, features: Matrix) -> Matrix | None:
    """What goes into the network's last linear layer, float32 (rows, width); None without one.

    The last one is the one that runs last.
    """
    seen: list[Tensor] = []
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, given: seen.append(given[0]))
        for layer in layers
    ]
    trained = network.training
    network.eval()
    try:
        with torch.inference_mode():
            network(torch.from_numpy(features))
    finally:
        network.train(trained)
        for hook in hooks:
            hook.remove()
    if not seen or seen[-1].shape[0] != len(features):
        return None
    found: Matrix = seen[-1].reshape(len(features), -1).numpy().copy()
    return found
