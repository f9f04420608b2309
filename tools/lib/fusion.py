"""Several views of one picture, or several models, become one row of logits. Copyable: imports numpy and torch only.

    logits = POOLS["topk"](table, k=3)          # [N, V, C] -> [N, C]; numpy gives numpy, torch gives torch

Each row is a function of its own views alone; with one view each gives the softmax of that view. N samples, V views,
C classes. In `log p` a view counts as much as any other, however large its logits are.
"""

import functools

import numpy as np
import torch
from torch.nn import functional as F


def either(pool):
    """Lets a pool of torch tensors also take numpy arrays, in float64."""

    @functools.wraps(pool)
    def wrapped(logits, **options):
        if not isinstance(logits, torch.Tensor):
            return pool(torch.as_tensor(np.asarray(logits, np.float64)), **options).numpy()
        return pool(logits, **options)

    return wrapped


def mean_logits(logits):
    """Mean of the logits: the geometric mean of the probabilities."""
    return logits.mean(1)


def largest(logits):
    """Of each class the view that believes most in it."""
    return F.log_softmax(logits, -1).amax(1)


def logsumexp(logits):
    """Log of the mean probability: one sure view moves it more than it moves `mean`."""
    return F.log_softmax(logits, -1).logsumexp(1) - np.log(logits.shape[1])


def mean_of(logits, score, k):
    """Mean of the k views [N, V] with the highest score; fewer views than k: of all."""
    top = score.topk(min(k, score.shape[1]), 1).indices
    return logits.gather(1, top[..., None].expand(-1, -1, logits.shape[2])).mean(1)


def topk(logits, k=2):
    """Mean of the k surest views. Where any view may show the object, this prefers views that are sure of nothing."""
    return mean_of(logits, logits.softmax(-1).amax(-1), k)


def topk_positive(logits, k=2, positive=1):
    """Mean of the k views that believe most in the positive class."""
    return mean_of(logits, logits.softmax(-1)[..., positive], k)


def whole_topk(logits, k=2, positive=1):
    """The first view (the whole picture) and the mean of the k others that believe most in the positive class."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return (logits[:, 0] + topk_positive(logits[:, 1:], k, positive)) / 2


def certain(logits, sharpness=2.0):
    """Mean weighted by certainty: entropy of the view to the power of -sharpness."""
    entropy = -(logits.softmax(-1) * F.log_softmax(logits, -1)).sum(-1)
    weights = ((entropy + 1e-10).log() * -sharpness).softmax(1)
    return (weights[..., None] * logits).sum(1)


POOLS = {
    name: either(pool)
    for name, pool in {
        "mean": mean_logits, "topk": topk, "topk_positive": topk_positive, "whole_topk": whole_topk, "max": largest,
        "logsumexp": logsumexp, "certain": certain,
    }.items()
}  # fmt: skip


def simplex_weights(probabilities, labels, rounds=500):
    """Weights [M], 0 or more with sum 1, of the mixture of M models' [M, N, C] with the lowest NLL, by EM."""
    truth = np.maximum(np.asarray(probabilities)[:, np.arange(len(labels)), labels], 1e-15)  # [M, N]
    weights = np.full(len(truth), 1 / len(truth))
    for _ in range(rounds):
        weights = weights * (truth / (weights @ truth)).mean(1)
    return weights
