"""Probes: they count everything, and they find the minimum."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minissl.evaluation import probes
from minissl.evaluation.columns import PROBE_STRENGTHS


def sparse(dense):
    """A dense matrix (N, D) as SparseRows, entry by entry."""
    indices, values, offsets = [], [], [0]
    for row in dense:
        for column, value in enumerate(row.tolist()):
            if value != 0:
                indices.append(column)
                values.append(value)
        offsets.append(len(indices))
    return probes.SparseRows(torch.tensor(indices), torch.tensor(offsets), torch.tensor(values),
                             dense.shape[1])


def sparse_matrix(rows, columns, seed=0):
    """A dense matrix with about half of its entries zero, and a row without any entry."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draws)
    x[torch.rand(rows, columns, generator=draws) < 0.5] = 0
    x[1] = 0
    return x


# ---------------------------------------------------------------- accuracy, draws, neighbours

def test_accuracy_is_the_percentage_of_all_items():
    assert probes.accuracy([0, 1, 1], torch.tensor([0, 1, 0])) == pytest.approx(200 / 3)
    assert probes.accuracy(np.ones(1001), np.append(np.ones(1000), 0)) == 100 * 1000 / 1001


def test_label_draws_are_balanced_and_repeatable():
    labels = np.array([0, 1, -1, 1, 0, 1, 1, 0, -1])
    drawn = probes.draw_labels(labels, 2, seed=3)
    assert len(set(drawn)) == 4 and sorted(labels[drawn]) == [0, 0, 1, 1]
    assert (drawn == probes.draw_labels(labels, 2, seed=3)).all()
    draws = {tuple(probes.draw_labels(labels, 2, seed)) for seed in range(9)}
    assert len(draws) > 1
    assert (probes.draw_labels(labels, None, 0) == np.flatnonzero(labels >= 0)).all()
    with pytest.raises(ValueError, match="class 0 has 3 labelled examples, not 4"):
        probes.draw_labels(labels, 4, 0)


def test_nearest_neighbours_vote_as_a_loop_does():
    torch.manual_seed(1)
    features, labels = 3 + torch.randn(30, 4), torch.randint(0, 3, (30,))
    queries, answers = 3 + torch.randn(50, 4), torch.randint(0, 3, (50,))
    centre = features.mean(0)
    right = 0
    for query, answer in zip(queries, answers):
        cosine = [float(F.cosine_similarity(query - centre, f - centre, dim=0)) for f in features]
        nearest = sorted(range(30), key=lambda i: -cosine[i])[:5]
        votes = np.zeros(3)
        for i in nearest:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        right += int(votes.argmax()) == int(answer)
    found = probes.knn_accuracy(features, labels, queries, answers, k=5)
    assert found == pytest.approx(100 * right / 50)


# ---------------------------------------------------------------- sparse rows

def test_sparse_rows_are_picked_in_the_order_given():
    x = sparse_matrix(6, 5)
    rows = [5, 1, 0, 5]
    picked = sparse(x)[rows]
    assert len(picked) == 4 and picked.shape == (4, 5)
    assert torch.equal(picked.to_dense(), x[rows])


def test_the_first_columns_are_those_of_the_dense_matrix():
    dense = sparse_matrix(6, 9)
    for n in (0, 4, 9):
        assert torch.equal(sparse(dense).first_columns(n).to_dense(), dense[:, :n])


def test_sparse_products_equal_dense_ones():
    x = sparse_matrix(7, 5)
    w = torch.randn(5, 3, requires_grad=True)
    error = torch.randn(7, 3)
    torch.testing.assert_close(sparse(x) @ w, x @ w)
    torch.testing.assert_close(sparse(x).transpose() @ error, x.T @ error)
    assert torch.equal(sparse(x).transpose().to_dense(), x.T)
    gradient, = torch.autograd.grad((sparse(x) @ w * error).sum(), w)
    torch.testing.assert_close(gradient, x.T @ error)


# ---------------------------------------------------------------- logistic regression

def largest_slope(x, labels, weights, strength):
    """The largest derivative of the loss of logistic regression, in float64 by autograd."""
    weights = weights.double().requires_grad_()
    logits = x.double() @ weights[:-1] + weights[-1]
    loss = F.cross_entropy(logits, labels) + strength / 2 * weights[:-1].square().sum()
    loss.backward()
    return weights.grad.abs().max()


def test_logistic_regression_finds_the_minimum():
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5), torch.randint(0, 3, (60,))
    weights = probes.logistic_regression(x, labels, 3, 0.1)
    assert largest_slope(x, labels, weights, 0.1) < 1e-4     # convex: there is no better place


def test_the_minimum_is_found_with_more_features_than_examples():
    torch.manual_seed(0)
    x, labels = torch.randn(8, 30), torch.randint(0, 3, (8,))
    weights = probes.logistic_regression(x, labels, 3, 0.1)
    assert largest_slope(x, labels, weights, 0.1) < 1e-4
    start = torch.randn(31, 3)
    start[-1] -= start[-1].mean()           # an equal amount in all biases changes nothing
    again = probes.logistic_regression(x, labels, 3, 0.1, start)
    torch.testing.assert_close(again, weights, atol=1e-3, rtol=1e-3)


def test_the_minimum_is_found_for_sparse_rows():
    x = sparse_matrix(60, 8)
    x[:, 6] = 0                             # a term that no example contains
    labels = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))
    weights = probes.logistic_regression(sparse(x), labels, 3, 0.1)
    assert largest_slope(x, labels, weights, 0.1) < 1e-4
    assert (weights[6] == 0).all()


# ---------------------------------------------------------------- the probe

@pytest.mark.parametrize("examples, columns", [(50, 6), (20, 30)])
def test_the_probe_is_fitted_on_all_its_labels(examples, columns):
    torch.manual_seed(0)
    x, labels = torch.randn(examples, columns), np.arange(examples) % 2
    model = probes.cross_validate(x, labels, 2, (1, 0.1))
    expected = probes.logistic_regression(x, labels, 2, model.strength)
    torch.testing.assert_close(model.weights, expected, atol=1e-3, rtol=1e-3)


def test_an_example_of_a_class_that_was_not_fitted_does_not_count():
    """A class of one label: the fold that holds it out has learned nothing about it."""
    torch.manual_seed(0)
    labels = torch.tensor([0] * 15 + [1] * 15 + [2])
    x = 4 * F.one_hot(labels, 3) + 0.1 * torch.randn(31, 3)
    fitted = probes.cross_validate(x, labels, 3, (0.01, 1e-4))
    assert fitted.loss < 0.1


def test_noise_gets_a_strong_penalty_and_signal_a_weak_one():
    torch.manual_seed(0)
    labels = np.arange(60) % 2
    noise, signal = torch.randn(60, 40), torch.randn(60, 40)
    signal[:, 0] += 8 * torch.from_numpy(labels)
    of_noise = probes.cross_validate(noise, labels, 2, PROBE_STRENGTHS).strength
    of_signal = probes.cross_validate(signal, labels, 2, PROBE_STRENGTHS).strength
    assert of_noise == max(PROBE_STRENGTHS) and of_signal < 0.3


def test_each_class_is_spread_evenly_over_the_folds():
    labels = np.array([0] * 20 + [1] * 7)
    fold = probes.assign_folds(labels, 2, 5)
    assert np.bincount(fold[:20], minlength=5).tolist() == [4] * 5
    assert sorted(np.bincount(fold[20:], minlength=5)) == [1, 1, 1, 2, 2]
    assert (fold[:20] != np.arange(20) % 5).any()            # at random, not in turn
