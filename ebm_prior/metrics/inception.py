"""Inception score (Salimans et al., 2016, arXiv:1606.03498): sure of each class, and of many.

    IS = exp( E_x KL( p(y|x) || p(y) ) )

computed on ten parts of the samples; mean and standard deviation over the parts are what
papers report. Which sample goes into which part is a fixed random choice, torch-fidelity's,
so that pictures sorted by class do not fall into parts of one class each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["InceptionScore", "inception_score"]

SPLITS = 10
SHUFFLE_SEED = 2020  # torch-fidelity's `rng_seed`


class InceptionScore:
    """Builds the score from class probabilities that arrive in batches and are not kept.

    Args:
        total: Number of samples to come.
    """

    def __init__(self, total: int) -> None:
        bounds = [i * total // SPLITS for i in range(SPLITS + 1)]
        part = np.empty(total, dtype=np.int64)
        order = np.random.RandomState(SHUFFLE_SEED).permutation(total)
        part[order] = np.repeat(np.arange(SPLITS), np.diff(bounds))
        self.part, self.seen = torch.from_numpy(part), 0
        self.negative_entropy = torch.zeros(SPLITS, dtype=torch.float64)
        self.sums: Tensor | None = None

    def add(self, probabilities: Tensor) -> None:
        """Take in class probabilities (B, classes)."""
        p = probabilities.double()
        if self.sums is None:
            self.sums = torch.zeros(SPLITS, p.shape[1], dtype=torch.float64)
        part = self.part[self.seen : self.seen + len(p)]
        self.negative_entropy.index_add_(0, part, -torch.special.entr(p).sum(1))
        self.sums.index_add_(0, part, p)
        self.seen += len(p)

    def finish(self) -> tuple[float, float] | None:
        """Mean and standard deviation over the parts; None where a part would be empty.

        The mean over x of KL(p(y|x) || p(y)) is the entropy of p(y), which is the mean of
        p(y|x), minus the mean entropy of p(y|x): sums suffice.
        """
        if self.sums is None or len(self.part) < SPLITS:
            return None
        count = torch.bincount(self.part, minlength=SPLITS)
        marginal_entropy = torch.special.entr(self.sums / count[:, None]).sum(1)
        scores = (marginal_entropy + self.negative_entropy / count).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def inception_score(probabilities: Tensor) -> tuple[float, float] | None:
    """Mean and standard deviation over ten parts; None for fewer than ten samples.

    Args:
        probabilities: Class probabilities of samples, (N, classes).
    """
    score = InceptionScore(len(probabilities))
    score.add(probabilities)
    return score.finish()
