"""Co-training: what the student learns from, and that it reads no label beyond the draw."""

import numpy as np
import pytest
import torch
from conftest import sparse

from minissl.evaluation import co_training, probes
from minissl.evaluation.co_training import CoTraining, in_units
from minissl.evaluation.columns import LinearLearner
from minissl.evaluation.ngrams import NGrams, naive_bayes_weights


N = 400                 # texts: 200 for training, 50 held out, 50 for the test, 100 without label


def co_training_of(weighting="tf-idf", seed=0, classes=2):
    """A CoTraining for which the vector and the words of a text both know something of its class.

    The texts stand in the order of the line above.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, N)
    x = rng.normal(size=(N, 4)).astype(np.float32)
    x[np.arange(N), labels] += 1.5
    words = rng.random((N, 40)) < 0.05
    for c in range(classes):
        words[labels == c, 8 * c:8 * c + 8] |= rng.random(((labels == c).sum(), 8)) < 0.35
    labels[300:] = -1
    probe = LinearLearner(torch.from_numpy(x), torch.from_numpy(labels), classes)
    rows = sparse(torch.from_numpy(words.astype(np.float32)))
    n_grams = NGrams(rows, rows.columns, probe.labels, classes, np.arange(250))
    n_grams.rows = {weighting: n_grams.rows[weighting]}
    pool = np.concatenate([np.arange(200), np.arange(300, N)])
    return CoTraining(probe, n_grams, pool, np.arange(200, 250))


def fit(column, indices, ngram_model=None):
    """What CoTraining fits to the labels of these texts, after the probe."""
    return column.fit(indices, column.probe.fit(indices), ngram_model)


DRAW = np.arange(0, 200, 10)
TEST = np.arange(250, 300)


def accuracy(predictions, labels):
    return probes.accuracy(predictions, labels[TEST])


@pytest.mark.parametrize("weighting", ["tf-idf", "naive Bayes"])
def test_the_student_makes_the_answers_better(weighting):
    gains = []
    for seed in range(8):
        column = co_training_of(weighting, seed)
        labels = column.probe.labels
        alone = column.probe.predict(column.probe.fit(DRAW), TEST)
        both = column.predict(fit(column, DRAW), TEST)
        gains.append(accuracy(both, labels) - accuracy(alone, labels))
    assert np.mean(gains) > 3, gains


@pytest.mark.parametrize("weighting", ["tf-idf", "naive Bayes"])
def test_the_student_learns_from_labels_and_guesses(weighting, monkeypatch):
    column = co_training_of(weighting, classes=3)
    labels, seen = column.probe.labels, {}
    regress = probes.logistic_regression

    def watched(rows, targets, classes, strength, **options):
        seen.update(rows=rows.to_dense(), targets=targets, strength=strength, **options)
        return regress(rows, targets, classes, strength, **options)
    probe_model = column.probe.fit(DRAW)
    weights = probe_model.weights
    monkeypatch.setattr(probes, "logistic_regression", watched)
    column.fit(DRAW, probe_model, None)

    features = column.probe.x.double()
    rows = column.n_grams.rows[weighting].to_dense()
    unlabelled = [n for n in range(200) if n not in DRAW] + list(range(300, N))
    expected, soft, texts = [], [], []
    for n in unlabelled:
        logits = features[n] @ weights[:-1].double() + weights[-1].double()
        p = logits.exp() / logits.exp().sum()
        guess = p**2 / sum(p**2)
        expected.append(guess)
        soft.append(guess)
        texts.append(rows[n])
    for n in DRAW:
        one = torch.zeros(3, dtype=torch.double)
        one[labels[n]] = 1
        expected.append(one * (1 + 0.5 * len(unlabelled) / len(DRAW)))
        soft.append(one)
        texts.append(rows[n])
    expected = torch.stack(expected)
    expected *= len(expected) / expected.sum()
    assert torch.equal(seen["rows"], torch.stack(texts))
    assert seen["strength"] == co_training.STRENGTHS[weighting]
    torch.testing.assert_close(seen["targets"].double(), expected, rtol=1e-4, atol=1e-5)
    if weighting == "naive Bayes":
        r = naive_bayes_weights(sparse(torch.stack(texts)), torch.stack(soft).float(), 3)
        torch.testing.assert_close(seen["weight_scale"], r, rtol=1e-3, atol=1e-4)


def test_no_label_beyond_the_draw_is_read():
    models = []
    for permuted in (False, True):
        column = co_training_of()
        if permuted:
            others = np.setdiff1d(np.arange(N), DRAW)
            labels = column.probe.labels.clone()
            labels[others] = labels[others].flip(0)
            column.probe.labels = column.n_grams.labels = labels
        model = fit(column, DRAW)
        models.append((model.probe_model.weights, model.student.weights))
    for one, other in zip(*models):
        assert torch.equal(one, other)


def test_with_many_labels_the_student_is_the_baseline(monkeypatch):
    column = co_training_of()
    monkeypatch.setattr(co_training, "MANY_LABELS", 50)
    every = np.arange(200)
    expected = column.n_grams.fit(every)
    assert fit(column, every, expected).student is expected


def test_without_other_texts_the_student_is_the_baseline():
    column = co_training_of()
    column.pool = every = np.arange(200)
    expected = column.n_grams.fit(every)
    assert fit(column, every, expected).student is expected


def test_logits_are_measured_in_their_standard_deviation():
    torch.manual_seed(0)
    logits, reference = torch.randn(7, 3), torch.randn(50, 3)
    result = in_units(logits, reference)
    shift = torch.randn(50, 1)
    torch.testing.assert_close(in_units(5 * logits + 2, 5 * reference + shift), result)
    units = in_units(reference, reference)
    assert float(units.std(correction=0)) == pytest.approx(1)
    torch.testing.assert_close(units.mean(1), torch.zeros(50), atol=1e-6, rtol=0)
    assert torch.equal(result.argmax(1), logits.argmax(1))
