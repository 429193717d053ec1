"""Self-training: what it may see, and that its steps are those of the formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minissl.evaluation import probes, self_training
from minissl.evaluation.columns import LinearLearner
from minissl.evaluation.self_training import SelfTraining, nearest_neighbours, spread


def clusters(sizes, distance=3.0, columns=6, seed=0):
    """Features (N, D) in shuffled clusters of these sizes, and the number of each one's cluster."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=draws)]
    x = torch.randn(len(labels), columns, generator=draws)
    x += distance * F.one_hot(labels, columns)
    return x - x.mean(0), labels


def columns_of(x, labels, pool):
    """The probe and the self-training of the same features."""
    probe = LinearLearner(x, labels, int(labels.max()) + 1)
    return probe, SelfTraining(probe, pool)


def fit_both(columns, indices):
    """What the probe and the self-training of `columns_of` fit to the labels of these examples."""
    probe, self_training = columns
    probe_model = probe.fit(indices)
    return probe_model, self_training.fit(indices, probe_model)


def self_trained_weights(x, labels, pool, drawn):
    """The weights (D + 1, C) of the second probe, from the labels `drawn`."""
    _, model = fit_both(columns_of(x, labels, pool), drawn)
    return model.weights


def test_neighbours_are_those_of_a_loop():
    x, _ = clusters([15, 12])
    cosines, indices = nearest_neighbours(x, 4, rows=10)
    for i in range(27):
        cosine = F.cosine_similarity(x[i:i + 1], x, dim=1)
        cosine[i] = -2
        order = sorted(range(27), key=lambda j: -cosine[j])[:4]
        assert indices[i].tolist() == order
        torch.testing.assert_close(cosines[i], cosine[order])


def test_guesses_spread_as_in_a_loop():
    torch.manual_seed(0)
    p = torch.rand(9, 3).softmax(1)
    cosines, indices = torch.rand(9, 2), torch.randint(0, 9, (9, 2))
    q = p.numpy().copy()
    for _ in range(3):
        before = q.copy()
        for i in range(9):
            weights = np.exp(cosines[i].numpy() / 0.07)
            around = np.zeros(3)
            for weight, j in zip(weights / weights.sum(), indices[i]):
                around += weight * before[j]
            q[i] = 0.2 * p[i].numpy() + 0.8 * around
    found = spread(p, cosines, indices)
    np.testing.assert_allclose(found, q, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(9))


def test_the_second_probe_learns_from_sharpened_guesses_and_labels(monkeypatch):
    """What it is fitted to, by the formulas at the top of self_training.py."""
    x, labels = clusters([40, 40, 40], columns=20)
    monkeypatch.setattr(self_training, "NEIGHBOUR_AXES", 7)
    pool, drawn = np.arange(90), np.append(np.arange(0, 30, 5), 100)      # one outside of the pool
    probe, second = columns_of(x, labels, pool)
    first = probe.fit(drawn)
    asked = []

    def note(x, targets, classes, strength, start, tolerance):
        asked.append((x, targets, strength))
        return start

    monkeypatch.setattr(self_training.probes, "logistic_regression", note)
    second.fit(drawn, first)
    features, targets, strength_of_second = asked[0]

    axes = second.axes                                                    # all 20, so only turned
    assert axes.shape == (20, 20)
    p = (x[pool] @ first.weights[:-1] + first.weights[-1]).softmax(1)
    for n in drawn[:-1]:
        p[n] = F.one_hot(labels[n], 3).float()
    on_axes = x[pool] @ axes[:, :7]
    on_axes = on_axes / on_axes.square().mean(0).sqrt().sqrt()
    q = spread(p, *nearest_neighbours(on_axes, 10)) ** 4
    others = np.setdiff1d(pool, drawn)
    guesses = q[others] / q[others].sum(1, keepdim=True)
    expected = probes.weighted_targets(guesses, F.one_hot(labels[drawn], 3).float())
    torch.testing.assert_close(targets, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(features, x[np.append(others, drawn)] @ axes)
    assert strength_of_second == pytest.approx(first.strength * 7 / (84 + 7))


def test_weights_of_classes_stand_for_repeated_examples():
    torch.manual_seed(0)
    x, labels = torch.randn(20, 4), torch.randint(0, 3, (20,))
    targets = F.one_hot(labels, 3).float()
    targets[0] = torch.tensor([2.0, 1, 0])      # example 0 three times, with two labels
    targets *= 20 / 22
    found = probes.logistic_regression(x, targets, 3, 0.1)
    repeated = torch.cat([x[[0, 0, 0]], x[1:]])
    labels = torch.cat([torch.tensor([0, 0, 1]), labels[1:]])
    expected = probes.logistic_regression(repeated, labels, 3, 0.1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_one_label_for_each_of_two_far_clusters_is_enough():
    x, labels = clusters([100, 100], distance=8.0)
    drawn = probes.draw_labels(labels, 1, 0)
    columns = columns_of(x, labels, np.arange(150))
    _, model = fit_both(columns, drawn)
    test = np.arange(150, 200)
    predictions = columns[1].predict(model, test)
    assert probes.accuracy(predictions, labels[test]) == 100


@pytest.mark.parametrize("sizes, least", [([300, 300, 300], 3), ([600, 200, 60], 1)])
def test_it_beats_the_probe_when_labels_are_few(sizes, least):
    x, labels = clusters(sizes, distance=4.0, columns=60)
    pool = np.arange(len(x) * 2 // 3)
    test = np.arange(len(pool), len(x))
    columns = columns_of(x, labels, pool)
    gains = []
    for seed in range(5):
        drawn = probes.draw_labels(labels[pool], 3, seed)
        accuracies = [probes.accuracy(column.predict(model, test), labels[test])
                      for column, model in zip(columns, fit_both(columns, drawn))]
        gains.append(accuracies[1] - accuracies[0])
    assert np.mean(gains) > least, gains


def test_labels_beyond_the_draw_are_never_read():
    x, labels = clusters([60, 60, 60])
    drawn = probes.draw_labels(labels[:120], 4, 0)
    garbage = torch.full_like(labels, 10**6)
    garbage[drawn] = labels[drawn]
    expected = self_trained_weights(x, labels, np.arange(120), drawn)
    probe = LinearLearner(x, garbage, 3)
    _, found = fit_both((probe, SelfTraining(probe, np.arange(120))), drawn)
    assert torch.equal(found.weights, expected)


def test_examples_outside_of_the_pool_are_never_read():
    x, labels = clusters([60, 60, 60])
    changed = x.clone()
    changed[120:] = float("nan")
    drawn = probes.draw_labels(labels[:120], 4, 0)
    expected = self_trained_weights(x, labels, np.arange(120), drawn)
    found = self_trained_weights(changed, labels, np.arange(120), drawn)
    assert torch.equal(found, expected)


def test_without_other_images_it_is_the_probe():
    x, labels = clusters([20, 20])
    everything = np.arange(40)
    probe_model, model = fit_both(columns_of(x, labels, everything), everything)
    assert torch.equal(model.weights, probe_model.weights)


def test_with_many_labels_it_is_the_probe(monkeypatch):
    x, labels = clusters([40, 40])
    columns = columns_of(x, labels, np.arange(80))
    for most, same in ((19, True), (20, False)):
        monkeypatch.setattr(self_training, "MOST_LABELS", most)
        probe_model, model = fit_both(columns, np.arange(20))
        assert torch.equal(model.weights, probe_model.weights) == same


def test_a_few_other_images_change_little():
    x, labels = clusters([30, 30, 30], columns=20)
    columns = columns_of(x, labels, np.arange(62))
    drawn = np.arange(60)
    test = np.arange(62, 90)
    accuracies = [probes.accuracy(column.predict(model, test), labels[test])
                  for column, model in zip(columns, fit_both(columns, drawn))]
    assert abs(accuracies[0] - accuracies[1]) < 5, accuracies


def test_images_without_a_label_serve_like_any_other():
    x, labels = clusters([60, 60, 60])
    drawn = probes.draw_labels(labels[:60], 3, 0)
    expected = self_trained_weights(x, labels, np.arange(120), drawn)
    labels[60:120] = -1
    found = self_trained_weights(x, labels, np.arange(120), drawn)
    torch.testing.assert_close(found, expected)


def test_labels_may_come_from_outside_of_the_pool():
    """The row "all" also draws held-out examples."""
    x, labels = clusters([60, 60, 60])
    drawn = np.append(probes.draw_labels(labels[:100], 3, 0), [100, 101, 102])
    weights = self_trained_weights(x, labels, np.arange(100), drawn)
    assert weights.shape == (7, 3) and weights.isfinite().all()
