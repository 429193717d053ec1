"""A column of finetune.py's table: a way to get a classifier from a few labels.

A task, TextTask or ImageTask, holds the examples and knows which of them are for training, for
choices and for the test. It has a column for each way to get a classifier. A column learns from
the labels of the examples that it is given, and from no others. (finetune.py chooses its option
on held-out labels.) It may build on the columns to its left: self-training and fine-tuning begin
at the linear probe.

This file has what texts and images share.
"""

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

from minissl.data.splits import HELD_OUT, TEST, TRAIN, evenly_spaced
from minissl.evaluation import probes


# Examples whose classes self-training guesses, labelled ones included. finetune.py fills the pool
# up to this number with examples without a label, and a Task takes no more labelled ones.
MOST_POOL = 50_000
# With more labels in all, "from scratch" and "fine-tuned" have other options, and for texts
# "self-trained" uses no guesses.
MANY_LABELS = 5000


def no_options(n):
    """The options of a column that has nothing to choose."""
    return [None]


@dataclass
class Column:
    """A way to get a classifier from a few labels.

    fit(indices, option, seed, fitted) returns a model that has learned from the labels of these
    examples alone. A model is whatever `predict` of the same column takes. fitted: {name: model}
    of the columns that it needs, which have learned from the same labels.
    predict(model, indices) returns the classes of these examples, (n,) int64.
    """
    fit: Callable
    predict: Callable
    # The names of columns to its left, on which it builds. Those of a column with several options
    # may have neither options nor needs.
    needs: tuple = ()
    options: Callable = no_options  # n labels -> options; one is chosen on held-out examples
    prefers_first: bool = False     # the first option is the safe one, see `choose` in finetune.py
    is_random: bool = True          # whether another seed gives another model


def plain_column(learner):
    """The Column of a learner without options, in which nothing is random.

    learner: an object with fit(indices) -> model and predict(model, indices) -> classes.
    """
    def fit(indices, option, seed, fitted):
        return learner.fit(indices)
    return Column(fit, learner.predict, is_random=False)


class Task:
    """The examples of a table: their labels, their splits and the pool.

    A subclass adds columns(), the columns of the table; default_labels, its rows; choice_draws,
    the draws of labels for each choice. It calls make_probe.

    Argument: examples, Texts or Images. An example without a label has the label −1 and is of
    the training split.

    Attributes:
        classes: their names
        labels: (N,) int64
        train, held_out, test: the indices of the labelled examples of each split
        pool: those of the examples whose classes self-training guesses: a sample of the training
            examples, and all those without a label. Their labels are read only where a draw
            contains them.
        probe, mean, std: see make_probe
    """

    def __init__(self, examples):
        self.classes = examples.classes
        self.labels = torch.from_numpy(examples.labels)
        has_label = examples.labels >= 0
        self.train = np.flatnonzero(has_label & (examples.split == TRAIN))
        self.held_out = np.flatnonzero(examples.split == HELD_OUT)
        self.test = np.flatnonzero(examples.split == TEST)
        sample = self.train[evenly_spaced(len(self.train), MOST_POOL)]
        self.pool = np.concatenate([sample, np.flatnonzero(~has_label)])

    def make_probe(self, features):
        """Make the learner of the column "linear probe", from features (N, D) of all examples.

        Also sets mean and std (D,), those of the training examples.
        """
        x, self.mean, self.std = standardize(features, self.train)
        self.probe = LinearLearner(x, self.labels, len(self.classes))


PROBE_STRENGTHS = (3, 1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


class LinearLearner:
    """Learns logistic regressions, with a strength chosen by cross-validation on the given labels.

    Arguments: x, the features of all N examples: x[indices] is (n, D); labels (N,) int64;
    n_classes; strengths, to choose from.
    """

    def __init__(self, x, labels, n_classes, strengths=PROBE_STRENGTHS):
        self.x = x
        self.labels = labels
        self.n_classes = n_classes
        self.strengths = strengths

    def fit(self, indices):
        """A LinearModel. There is nothing random in it."""
        return probes.cross_validate(
            self.x[indices], self.labels[indices], self.n_classes, self.strengths)

    def predict(self, model, indices):
        predictions = []
        for part in np.array_split(indices, parts_of(len(indices), len(model.weights))):
            logits = probes.linear_logits(self.x[part], model.weights)
            predictions.append(logits.argmax(1))
        return torch.cat(predictions)


def rows_at_once(columns):
    """How many rows of so many columns to compute with at once.

    At most 10,000, and at most 128 MB of float32, but at least one.
    """
    return min(10_000, max(1, 2**25 // columns))


def parts_of(n, columns):
    """Into how many parts to cut n rows of so many columns; see `rows_at_once`."""
    return max(1, -(-n // rows_at_once(columns)))


def standardize(x, rows):
    """x (N, D) with mean 0 and std 1 over these rows; and that mean (D,) and std (D,).

    A column that is constant in these rows keeps its scale. Divided by a tiny number, it would
    outweigh all others in the rows where it is not constant.
    """
    mean = x[rows].mean(0)
    std = x[rows].std(0, correction=0)
    std = torch.where(std < 1e-6, 1, std)
    return (x - mean) / std, mean, std
