"""Losses by task: what a network is pulled towards, by labels and by another network's answers.

Why: replicas, student and exporter must agree on what a logit means.

Logits are of shape (rows, outputs). `activated` turns them into answers: probabilities of a binary
or multiclass task; of regression and ranking the logits themselves. Rankings learn from pairs of
rows of one group, the more relevant above the other (Burges et al., RankNet, 2005).

Invariants: losses are means over rows, each times its weight; a row whose anchor is NaN is pulled
nowhere. Knows nothing about optimisers and replicas.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cloud_learner.stats.tasks import Task


def activated(task: Task, logits: Tensor) -> Tensor:
    """Answers of shape (rows, outputs)."""
    if task.kind == "binary":
        return torch.sigmoid(logits)
    return torch.softmax(logits, dim=1) if task.kind == "multiclass" else logits


def hard_loss(
    task: Task, logits: Tensor, labels: Tensor, weights: Tensor, groups: Tensor
) -> Tensor:
    """Against labels (rows,); a scalar."""
    if task.kind == "ranking":
        return _pairwise(logits[:, 0] / task.scale, labels, weights, groups)
    if task.kind == "binary":
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits[:, 0], labels, reduction="none"
        )
    elif task.kind == "multiclass":
        losses = nn.functional.cross_entropy(logits, labels.long(), reduction="none")
    else:
        losses = ((logits[:, 0] - labels) / task.scale) ** 2
    return (losses * weights).mean()


def soft_loss(task: Task, logits: Tensor, anchors: Tensor) -> Tensor:
    """Against another network's answers (rows, outputs), NaN where there are none; a scalar."""
    known = ~torch.isnan(anchors[:, :1])
    anchors = torch.where(known, anchors, 0.0)
    if task.kind == "binary":
        losses = nn.functional.binary_cross_entropy_with_logits(logits, anchors, reduction="none")
    elif task.kind == "multiclass":
        losses = nn.functional.cross_entropy(logits, anchors, reduction="none")[:, None]
    else:
        losses = ((logits - anchors) / task.scale) ** 2
    return (losses * known).mean()


def _pairwise(scores: Tensor, labels: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
    above = (labels[:, None] > labels[None, :]) & (groups[:, None] == groups[None, :])
    pull = weights[:, None] * (
        weights[None, :] > 0
    )  # a row without weight pulls from below neither
    losses = nn.functional.softplus(scores[None, :] - scores[:, None]) * pull
    return (losses * above).sum() / above.sum().clamp(min=1)
