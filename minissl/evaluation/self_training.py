"""Self-training: a probe that also learns from images without labels.

The probe of a few labels guesses the classes of the other training images. Its guesses become
better if each image listens to its nearest neighbours. A second probe learns from the labels
and from these guesses:

    p = softmax of the first probe's logits, but one-hot for the labels of the draw      (M, C)
        (computed on the first 256 principal axes of the features)
    q ← (1 − α) p + α · weighted mean of q over the nearest neighbours, three times     (M, C)
    soft label of an image = q⁴ / Σ q⁴

Of n labels beside U guesses each weighs 1 + U / (2n), and a guess weighs 1, so that few labels
count beside many guesses (`probes.weighted_targets`).

The formula of q is the label spreading of Zhou et al. 2004, "Learning with local and global
consistency", started at the guesses of a probe. Soft pseudo-labels from neighbours are those
of Iscen et al. 2019, arXiv 1904.04717. The power is the sharpening of Berthelot et al. 2019,
arXiv 1905.02249.

The classes are not balanced: their sizes are those that the probe guesses. Forcing equal sizes
helps a little where the classes are equal, and costs more than it can win where they are not
(EXPERIMENTS.md, "Does self-training help with few labels?").
"""

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from minissl.evaluation import probes
from minissl.evaluation.probes import VOTE_TEMPERATURE


AXES = 256              # principal axes on which the second probe is fitted
NEIGHBOUR_AXES = 128    # of them, where neighbours are searched
NEIGHBOURS = 10
# With more labels the guesses do harm, so this is the plain probe. (Set when test accuracies
# had been seen: RESULTS.md, "How to read the tables".)
MOST_LABELS = 2000


def nearest_neighbours(x, k, rows=2000):
    """The k nearest other rows of each row of x (M, D): cosines (M, k) and indices (M, k)."""
    x = F.normalize(x, dim=1)
    cosines, indices = [], []
    for begin in range(0, len(x), rows):
        similarity = x[begin:begin + rows] @ x.T                          # (rows, M)
        similarity.diagonal(begin).fill_(-2)    # an image is not its own neighbour
        nearest = similarity.topk(k, dim=1)
        cosines.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(cosines), torch.cat(indices)


def spread(p, cosines, indices, alpha=0.8, repeats=3):
    """Guesses (M, C) that listen to the neighbours, from p (M, C); see the top of the file.

    cosines, indices (M, k): the neighbours. Each weighs exp(cosine / VOTE_TEMPERATURE), as in
    `probes.knn_accuracy`.
    """
    weights = (cosines / VOTE_TEMPERATURE).softmax(1)[:, :, None]         # (M, k, 1)
    q = p
    for _ in range(repeats):
        around = (weights * q[indices]).sum(1)                            # (M, C)
        q = (1 - alpha) * p + alpha * around
    return q


class SelfTraining:
    """The learner of the column "self-trained" of images.

    Arguments: probe, the LinearLearner of the first probe; pool (M,), the indices of the
    images whose classes are guessed. Of their labels, only those of the `indices` that `fit`
    gets are read.
    """

    def __init__(self, probe, pool):
        self.probe = probe
        self.pool = pool

    # The next three are computed when they are first needed, once for all draws. A table with
    # many labels in each row needs none of them.

    @cached_property
    def axes(self):
        """The principal axes of the pool's features, (D, A), from the largest variance on."""
        # `principal_axes` has them from the smallest variance to the largest.
        return probes.principal_axes(self.probe.x[self.pool])[:, -AXES:].flip(1)

    @cached_property
    def x(self):
        """The pool's features on these axes, (M, A)."""
        return self.probe.x[self.pool] @ self.axes

    @cached_property
    def neighbours(self):
        """Cosines and indices (M, k) of the nearest neighbours.

        Each axis is divided by the square root of its standard deviation, so that the few axes
        of the largest variance do not decide alone.
        """
        x = self.x[:, :NEIGHBOUR_AXES]
        x = x / x.square().mean(0).clamp(min=1e-6) ** 0.25
        return nearest_neighbours(x, min(NEIGHBOURS, len(x) - 1))

    def fit(self, indices, probe_model):
        """A LinearModel, from the labels of these examples alone.

        probe_model: what `probe` has fitted to the same labels. It is also the result if the
        pool has no other image, or if there are more than MOST_LABELS labels. The probe minimizes
        Σ loss + n · strength/2 ‖W‖². The second fit keeps this penalty, but it averages over
        more examples, so its strength is smaller. Nothing is random.
        """
        is_labelled = np.isin(self.pool, indices)                         # (M,)
        others = torch.from_numpy(np.flatnonzero(~is_labelled))           # (U,) of the M
        n = len(indices)
        if len(others) == 0 or n > MOST_LABELS:
            return probe_model
        labels, C = self.probe.labels, self.probe.n_classes
        one_hot = F.one_hot(labels[indices], C).float()                   # (n, C)
        labelled = self.pool[is_labelled]       # those of `indices` that are in the pool

        weights = probe_model.weights                                     # (D + 1, C)
        on_axes = torch.cat([self.axes.T @ weights[:-1], weights[-1:]])   # (A + 1, C)
        p = probes.linear_logits(self.x, on_axes).softmax(1)              # (M, C)
        p[torch.from_numpy(is_labelled)] = F.one_hot(labels[labelled], C).float()
        q = spread(p, *self.neighbours) ** 4
        soft_labels = (q / q.sum(1, keepdim=True))[others]                # (U, C)

        targets = probes.weighted_targets(soft_labels, one_hot)
        x = torch.cat([self.x[others], self.probe.x[indices] @ self.axes])
        strength = probe_model.strength * n / len(targets)
        second = probes.logistic_regression(
            x, targets, C, strength, on_axes, tolerance=1e-4)             # (A + 1, C)
        weights = torch.cat([self.axes @ second[:-1], second[-1:]])
        return probes.LinearModel(weights, strength)

    def predict(self, model, indices):
        return self.probe.predict(model, indices)
