"""Self-training for texts: n-grams learn from what the document vector says.

A text has two descriptions, its document vector and its n-grams. The probe of a few
labels reads the document vector. It knows what a text is about, but not single words
and phrases. It guesses the classes of the texts without a label. A classifier of
n-grams, the student, learns from the labels and from these guesses. The answer is the
sum of both:

    p = softmax of the probe's logits a                           (U, C), without label
    soft label of a text = p² / Σ p²
    b = the student's logits. Of its n labels each weighs 1 + U / (2n), and a guess weighs 1,
        so that few labels count beside many guesses (`probes.weighted_targets`)
    answer = argmax_c  a_c / σ(a) + b_c / σ(b)

where σ is the standard deviation of all logits of the held-out texts, after the mean of
each text was subtracted. (With fewer than 100 held-out texts, some training texts join
them. Where a classifier has learned from some of these texts, as in the row "all", σ is a
little too large.)

The student sees something else than its teacher, so it makes other mistakes. What the sum
gains over each of the two, and over a student that reads the document vector itself, is in
EXPERIMENTS.md, "What should self-training on texts learn from its guesses?".

This is one round of co-training (Blum and Mitchell 1998, "Combining labeled and
unlabeled data with co-training"), with soft labels for all texts instead of hard ones
for the most certain.

With many labels the student is the classifier of the column "n-grams", which learns
from the labels alone. Then the sum shows what pretraining adds to n-grams.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minissl.evaluation import probes
from minissl.evaluation.columns import MANY_LABELS
from minissl.evaluation.ngrams import NGramModel, naive_bayes_weights
from minissl.evaluation.probes import LinearModel


STRENGTHS = {"tf-idf": 1e-4, "naive Bayes": 0.01}       # of the student's penalty


class CoTrained(NamedTuple):
    """The two models whose logits are added."""
    probe_model: LinearModel    # on the document vectors
    student: NGramModel


class CoTraining:
    """The learner of the column "self-trained" of texts.

    Arguments:
        probe: the LinearLearner of the document vectors of N texts
        n_grams: the NGrams of the same texts
        pool (M,): the indices of the texts whose classes are guessed. Of their labels, only
            those of the `indices` that `fit` gets are read.
        reference: the indices of the texts over which σ is computed
    """

    def __init__(self, probe, n_grams, pool, reference):
        self.probe = probe
        self.n_grams = n_grams
        self.pool = pool
        self.reference = reference

    def fit(self, indices, probe_model, ngram_model):
        """A CoTrained. There is nothing random in it.

        probe_model, ngram_model: what `probe` and `n_grams` have fitted to the same labels.
        """
        return CoTrained(probe_model, self.fit_student(indices, probe_model, ngram_model))

    def fit_student(self, indices, probe_model, ngram_model):
        """An NGramModel, from labels and from the guesses of the probe.

        With many labels, or without any other text, it is ngram_model, which has learned from
        the labels alone.
        """
        C = self.probe.n_classes
        others = np.setdiff1d(self.pool, indices)                         # (U,)
        if len(indices) > MANY_LABELS or len(others) == 0:
            return ngram_model

        logits = probes.linear_logits(self.probe.x[others], probe_model.weights)
        p = logits.softmax(1)                                             # (U, C)
        guesses = p**2 / (p**2).sum(1, keepdim=True)
        one_hot = F.one_hot(self.probe.labels[indices], C).float()
        targets = probes.weighted_targets(guesses, one_hot)               # (U + n, C)

        # Naive Bayes weights wherever they exist, whatever ngram_model has taken: its choice
        # rests on a few labels.
        weighting = "naive Bayes" if "naive Bayes" in self.n_grams.rows else "tf-idf"
        rows = self.n_grams.rows[weighting][np.concatenate([others, indices])]
        scale = None
        if weighting == "naive Bayes":
            # In these ratios each text counts once, a labelled one as well. Larger weights for
            # the labels were not tried.
            scale = naive_bayes_weights(rows, torch.cat([guesses, one_hot]), C)
        weights = probes.logistic_regression(
            rows, targets, C, STRENGTHS[weighting], tolerance=1e-4, weight_scale=scale)
        return NGramModel(weighting, weights)

    def probe_logits(self, model, indices):
        """a / σ(a) of these texts, (n, C), for a CoTrained. Every row has the mean 0."""
        weights, x = model.probe_model.weights, self.probe.x
        logits = probes.linear_logits(x[indices], weights)
        return in_units(logits, probes.linear_logits(x[self.reference], weights))

    def student_logits(self, model, indices):
        """b / σ(b) of these texts, (n, C), for a CoTrained. Every row has the mean 0."""
        logits = self.n_grams.logits(model.student, indices)
        return in_units(logits, self.n_grams.logits(model.student, self.reference))

    def predict(self, model, indices):
        logits = self.probe_logits(model, indices) + self.student_logits(model, indices)
        return logits.argmax(1)


def in_units(logits, reference):
    """Logits (n, C) less the mean of each row, in standard deviations of those of `reference`."""
    reference = reference - reference.mean(1, keepdim=True)
    std = reference.std(correction=0).clamp(min=1e-6)
    return (logits - logits.mean(1, keepdim=True)) / std
