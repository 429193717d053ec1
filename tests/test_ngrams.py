"""N-grams: counted and weighted as in a loop, and chosen by the given labels alone."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import sparse

from minissl.data.text_sources import load_texts
from minissl.data.texts import Texts, encode_texts
from minissl.evaluation import ngrams, probes
from minissl.evaluation.ngrams import NGrams, naive_bayes_weights
from minissl.tokenizer import train_tokenizer
from minissl.transformer import TextEncoder


def word_counts(labels, seed=0, words=40, strength=0.4):
    """Counts (N, D) of words, a few of which are likelier in one of two classes."""
    draws = torch.Generator().manual_seed(seed)
    chance = torch.full((2, words), 0.3)
    chance[0, :6] += strength
    chance[1, 6:12] += strength
    present = torch.rand(len(labels), words, generator=draws) < chance[labels]
    return present * torch.randint(1, 4, present.shape, generator=draws).float()


def column_of(counts, labels):
    """The column of these counts (N, D), in which tf-idf and naive Bayes see the same terms."""
    rows = sparse(counts)
    return NGrams(rows, rows.columns, labels, int(labels.max()) + 1, np.arange(len(labels)))


# ---------------------------------------------------------------- counts

class Documents(list):
    """What counting needs of Texts: token arrays, and a tokenizer that has a length."""
    tokenizer = range(12)


DOCUMENTS = Documents(np.array(tokens) for tokens in
                      ([2, 3, 3, 3, 7, 9], [11], [9, 2, 3, 2, 3], [5, 5, 5, 5], [2, 3]))


def ngrams_of(tokens, longest):
    """All n-grams of a text as a list of tuples."""
    found = []
    for n in range(1, longest + 1):
        found += [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
    return found


def key_of(ngram, V=12):
    key = 0
    for token in ngram:
        key = key * V + token
    return key


@pytest.mark.parametrize("chosen", [
    [(2,), (11,)],
    [(3,), (2, 3), (3, 3), (11, 11), (2, 3, 3), (5, 5, 5), (9, 2, 3)],
])
def test_ngrams_are_counted_as_a_loop_does(chosen):
    keys = np.array([key_of(ngram) for ngram in chosen])
    counts = ngrams.count_ngrams(DOCUMENTS, keys, 3)
    assert counts.shape == (5, len(chosen))
    for row, tokens in zip(counts.to_dense(), DOCUMENTS):
        found = ngrams_of(tokens.tolist(), 3)
        assert row.tolist() == [found.count(ngram) for ngram in chosen]


def three_chunks(self, size):
    return np.array_split(np.arange(len(self)), 3)


def test_the_most_frequent_ngrams_are_those_of_a_loop(monkeypatch):
    strings = ["a bb a bb c", "a bb", "c c c", "bb a"] * 2 + ["d"]
    texts = encode_texts(strings, train_tokenizer(strings, 300))
    V = len(texts.tokenizer)
    counter = Counter()
    for i in range(len(texts)):
        counter.update(key_of(ngram, V) for ngram in ngrams_of(texts[i].tolist(), 3))
    expected = sorted(key for key, count in counter.items() if count >= 2)
    assert ngrams.frequent_ngrams(texts, 3, 1000).tolist() == expected
    assert len(expected) < len(counter)
    monkeypatch.setattr(Texts, "chunks", three_chunks)
    assert ngrams.frequent_ngrams(texts, 3, 1000).tolist() == expected
    least = sorted(counter.values())[-4]
    few = ngrams.frequent_ngrams(texts, 3, 4)
    assert len(few) == 4 and min(counter[key] for key in few.tolist()) == least


def test_tokens_and_pairs_are_counted_as_in_the_encoder():
    pairs = torch.tensor([2 * 12 + 3, 3 * 12 + 3])
    model = TextEncoder(12, pairs, width=8, heads=2, layers=1, window=8, document_columns=4)
    padded = torch.zeros(5, 6, dtype=torch.int64)            # 0 is PAD
    for row, tokens in zip(padded, DOCUMENTS):
        row[:len(tokens)] = torch.from_numpy(tokens)
    words_and_pairs = np.concatenate([np.arange(12), pairs.numpy()])
    found = ngrams.count_ngrams(DOCUMENTS, words_and_pairs, 2).to_dense()
    assert torch.equal(found, model.count_terms(padded))


# ---------------------------------------------------------------- weights

def test_tf_idf_is_the_textbook_formula():
    counts = torch.tensor([[2.0, 0, 1], [0, 3, 1], [1, 0, 0]])
    found = ngrams.tf_idf(sparse(counts), np.array([0, 1])).to_dense()
    for i in range(3):
        row = np.zeros(3)
        for j in range(3):
            if counts[i, j] > 0:
                df = int((counts[:2, j] > 0).sum())          # of the rows 0 and 1
                row[j] = (1 + np.log(float(counts[i, j]))) * (np.log(3 / (1 + df)) + 1)
        np.testing.assert_allclose(found[i], row / np.linalg.norm(row), rtol=1e-5)


def test_naive_bayes_weights_of_two_texts():
    """Class 0 is the text "a b" and class 1 the text "b"; p = (1, 1) and q = (0, 1)."""
    x = sparse(torch.tensor([[1.0, 1], [0, 1]]))
    found = naive_bayes_weights(x, [0, 1], 2)
    a = np.log((2 / 4) / (1 / 3))
    b = np.log((2 / 4) / (2 / 3))
    np.testing.assert_allclose(found, [[a, -a], [b, -b]], rtol=1e-6)


@pytest.mark.parametrize("classes, alpha", [(2, 1), (3, 0.5)])
def test_naive_bayes_weights_are_those_of_a_loop(classes, alpha):
    torch.manual_seed(0)
    x = (torch.rand(30, 8) < 0.3).float()
    x[:, 5] = 0                             # an n-gram that occurs in other texts alone
    labels = torch.randint(0, classes, (30,)).tolist()
    expected = np.zeros((8, classes))
    for c in range(classes):
        p, q = {}, {}
        for w in (0, 1, 2, 3, 4, 6, 7):
            p[w] = alpha + sum(float(row[w]) for row, y in zip(x, labels) if y == c)
            q[w] = alpha + sum(float(row[w]) for row, y in zip(x, labels) if y != c)
        for w in p:
            inside = p[w] / sum(p.values())
            outside = q[w] / sum(q.values())
            expected[w, c] = np.log(inside / outside)
    found = naive_bayes_weights(sparse(x), labels, classes, alpha)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_of_two_classes_the_scale_multiplies_the_columns():
    """NB-SVM's own form for two classes: one weight vector v on the columns x ∘ r."""
    labels = torch.arange(60) % 2
    x = (word_counts(labels) > 0).float()
    r = naive_bayes_weights(sparse(x), labels, 2)
    weights = probes.logistic_regression(
        sparse(x), labels, 2, 0.1, tolerance=1e-6, weight_scale=r)

    v = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v, bias], max_iter=500, tolerance_grad=1e-9,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = x.double() @ (r[:, 1] * v) + bias
        # The difference of two weights has half the penalty of the two together.
        value = F.binary_cross_entropy_with_logits(logits, labels.double())
        value = value + 0.1 / 4 * v.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    difference = weights[:-1, 1] - weights[:-1, 0]
    torch.testing.assert_close(difference.double(), (r[:, 1] * v).detach(), atol=1e-4, rtol=1e-3)


def test_a_weight_scale_divides_the_penalized_weights():
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5), torch.randint(0, 3, (60,))
    scale = torch.rand(5, 3) + 0.1
    scale[2, 1] = 0
    for rows in (x, sparse(x)):
        weights = probes.logistic_regression(rows, labels, 3, 0.1, weight_scale=scale)
        assert weights[2, 1] == 0
        weights = weights.double().requires_grad_()
        u = weights[:-1] / scale
        u = torch.where(scale == 0, 0, u)
        logits = x.double() @ weights[:-1] + weights[-1]
        loss = F.cross_entropy(logits, labels) + 0.05 * u.square().sum()
        gradient, = torch.autograd.grad(loss, weights)
        gradient[2, 1] = 0
        assert gradient.abs().max() < 1e-4
        start = probes.logistic_regression(rows, labels, 3, 10, weight_scale=scale)
        again = probes.logistic_regression(rows, labels, 3, 0.1, start, weight_scale=scale)
        torch.testing.assert_close(again[:-1], weights[:-1].float(), atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------- what may be seen

def test_the_weights_of_a_fold_do_not_know_the_held_out_labels(monkeypatch):
    fold = np.arange(50) % 5
    monkeypatch.setattr(probes, "assign_folds", lambda labels, classes, folds: fold)
    labels = torch.arange(50) // 5 % 2
    x = sparse((word_counts(labels) > 0).float())
    fitted = probes.cross_validate(
        x, labels, 2, (0.1,), lambda x, labels: naive_bayes_weights(x, labels, 2))
    losses = []
    for f in range(5):
        inside, outside = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        r = naive_bayes_weights(x[inside], labels[inside], 2)
        weights = probes.logistic_regression(x[inside], labels[inside], 2, 0.1, weight_scale=r)
        logits = probes.linear_logits(x[outside], weights)
        losses.append(float(F.cross_entropy(logits, labels[outside])))
    assert fitted.loss == pytest.approx(np.mean(losses), rel=1e-3)


def test_cross_validation_ends_with_a_fit_on_all_labels():
    labels = torch.arange(60) % 2
    x = sparse((word_counts(labels) > 0).float())
    fitted = probes.cross_validate(
        x, labels, 2, (1, 0.1), lambda x, labels: naive_bayes_weights(x, labels, 2))
    expected = probes.logistic_regression(x, labels, 2, fitted.strength,
                                          weight_scale=naive_bayes_weights(x, labels, 2))
    torch.testing.assert_close(fitted.weights, expected, atol=1e-3, rtol=1e-3)


def test_the_column_reads_no_label_beyond_the_draw():
    labels = torch.arange(120) % 2
    counts = sparse(word_counts(labels))
    drawn = np.arange(10, 50)
    garbage = torch.full_like(labels, 10**6)
    garbage[drawn] = labels[drawn]
    models = []
    for seen in (labels, garbage):
        column = NGrams(counts, counts.columns, seen, 2, np.arange(100))
        models.append(column.fit(drawn))
    one, other = models
    assert one.weighting == other.weighting and torch.equal(one.weights, other.weights)


def test_the_weighting_with_the_least_held_out_loss_is_taken():
    labels = torch.arange(200) % 2
    column = column_of(word_counts(labels), labels)
    model = column.fit(np.arange(100))
    fitted = {}
    fitted["tf-idf"] = probes.cross_validate(
        column.rows["tf-idf"][range(100)], labels[:100], 2, ngrams.TF_IDF_STRENGTHS)
    fitted["naive Bayes"] = probes.cross_validate(
        column.rows["naive Bayes"][range(100)], labels[:100], 2, ngrams.NAIVE_BAYES_STRENGTHS,
        lambda x, y: naive_bayes_weights(x, y, 2))
    assert model.weighting == min(fitted, key=lambda name: fitted[name].loss)
    assert torch.equal(model.weights, fitted[model.weighting].weights)
    predictions = column.predict(model, np.arange(100, 200))
    assert probes.accuracy(predictions, labels[100:]) > 75


@pytest.mark.parametrize("of_tf_idf, of_naive_bayes, chosen", [
    (0.5, 0.4, "naive Bayes"), (0.4, 0.5, "tf-idf"), (math.nan, math.nan, "tf-idf"),
])
def test_the_lesser_loss_decides_and_without_one_it_is_tf_idf(
        of_tf_idf, of_naive_bayes, chosen, monkeypatch):
    """With one label a class nothing can be left out, so both losses are nan."""
    losses = {0.0: of_naive_bayes, 1.0: of_tf_idf}

    def cross_validate(x, labels, classes, strengths, weight_scale_of=None):
        is_tf_idf = float(weight_scale_of is None)
        return probes.LinearModel(None, 1, losses[is_tf_idf])
    monkeypatch.setattr(probes, "cross_validate", cross_validate)
    labels = torch.arange(40) % 2
    assert column_of(word_counts(labels), labels).fit(np.arange(20)).weighting == chosen


def test_tf_idf_has_no_triples(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 300)
    everything = np.arange(len(texts))
    rows = ngrams.make_ngrams(texts, everything).rows
    keys = ngrams.frequent_ngrams(texts, 3, ngrams.MOST_NGRAMS)
    is_triple = keys >= 300**2
    assert is_triple.any()
    assert rows["tf-idf"].columns == (~is_triple).sum()
    assert rows["naive Bayes"].columns == len(keys)


def test_with_many_classes_there_is_tf_idf_alone():
    labels = torch.arange(60) % 6
    counts = word_counts(labels % 2)
    name, _ = column_of(counts, labels).fit(np.arange(60))
    assert name == "tf-idf"
    assert list(column_of(counts, labels % 5).rows) == ["tf-idf", "naive Bayes"]
