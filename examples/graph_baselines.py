"""What the graph autoencoder of examples/graph.py is compared with, and by which measures.

Each of these returns a function from pairs (M, 2) to scores (M,), larger for a likelier link:

    common_neighbours    how many neighbours two nodes share
    degree_product       their numbers of neighbours, multiplied: popular modules are imported
    spectral_embedding   eigenvectors of the normalised adjacency

They see the training links alone. What can be chosen is chosen on the links for choices.
"""

import numpy as np
import torch
from graph_data import pair_table

from minissl.evaluation import probes
from minissl.evaluation.columns import LinearLearner, standardize


MOST_NODES_OF_SPECTRUM = 6000   # all eigenvectors take 10 s at 3,000 nodes, 80 s at 6,000


# ---------------------------------------------------------------- measures

def auc(link_scores, non_link_scores):
    """Percent of the pairs of a link and a non-link in which the link scores higher.

    A tie counts one half. It is the area under the ROC curve, from the ranks of the links.
    """
    scores = np.concatenate([link_scores, non_link_scores])
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2          # of equal scores, from 1
    P, Q = len(link_scores), len(non_link_scores)
    wins = mean_rank[place[:P]].sum() - P * (P + 1) / 2
    return 100 * wins / (P * Q)


def average_precision(link_scores, non_link_scores):
    """Average precision in percent.

    For each link: the share of links among all pairs that score at least as high. The result is
    the mean of these shares. Equal scores are one threshold, so their order does not matter.
    """
    thresholds, link_counts = np.unique(link_scores, return_counts=True)
    links = np.sort(link_scores)
    non_links = np.sort(non_link_scores)
    links_above = len(links) - np.searchsorted(links, thresholds)
    non_links_above = len(non_links) - np.searchsorted(non_links, thresholds)
    precision = links_above / (links_above + non_links_above)
    return 100 * float((precision * link_counts).sum()) / len(links)


def measure(score, part):
    """(AUC, average precision) of a function pairs (M, 2) -> scores (M,).

    part: (links, non_links), as LinkSplit.choices or LinkSplit.test.
    """
    links, non_links = part
    scores = np.asarray(score(links)), np.asarray(score(non_links))
    return auc(*scores), average_precision(*scores)


# ---------------------------------------------------------------- scores of links

def inner_product(z):
    """z_i · z_j of codes (N, D)."""
    def score(pairs):
        return (z[pairs[:, 0]] * z[pairs[:, 1]]).sum(1)

    return score


def adjacency(split):
    """The training links as a matrix (N, N) float32, without the diagonal."""
    return pair_table(split.train, split.nodes).float().fill_diagonal_(0)


def common_neighbours(split):
    A = adjacency(split)

    def score(pairs):
        return (A[pairs[:, 0]] * A[pairs[:, 1]]).sum(1)

    return score


def degree_product(split):
    degree = adjacency(split).sum(1)

    def score(pairs):
        return degree[pairs[:, 0]] * degree[pairs[:, 1]]

    return score


def spectral_embedding(split, sizes=(16, 32, 64, 128, 192, 256), powers=(0, 1, 2)):
    """Σ_k λ_k^p u_ik u_jk over the largest eigenvalues of D^−½ (A + I) D^−½.

    Their number and the power p are those with the best AUC on the links for choices.
    The power 0 is a plain spectral embedding, and the power 1 the matrix itself, as far as these
    eigenvalues make it. The eigenvalues are sorted with their signs, so negative ones come last.
    Tang and Liu 2011, "Leveraging social media networks for classification".
    """
    A = adjacency(split).fill_diagonal_(1)
    scale = A.sum(1).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * A * scale)
    order = values.argsort(descending=True)
    values, vectors = values[order], vectors[:, order]

    def make_score(size, power):
        left = vectors[:, :size] * values[:size]**power
        right = vectors[:, :size]

        def score(pairs):
            return (left[pairs[:, 0]] * right[pairs[:, 1]]).sum(1)

        return score

    candidates = [make_score(size, power) for size in sizes for power in powers]
    aucs = [measure(score, split.choices)[0] for score in candidates]
    return candidates[int(np.argmax(aucs))]


def smoothed_features(xs, splits, convolve):
    """Â Â X for each split: what the encoder does, without its weights and its relu.

    Wu et al. 2019, "Simplifying Graph Convolutional Networks", arXiv 1902.07153.
    """
    smoothed = []
    for x, split in zip(xs, splits):
        smoothed.append(convolve(convolve(x, split.train), split.train))
    return smoothed


# ---------------------------------------------------------------- classes of nodes

def probe_accuracy(features, labels, drawn, test):
    """Percent of the nodes `test` that a logistic regression on the features gets right.

    It learns from the labels of the nodes `drawn`, and cross-validation on these labels chooses
    its strength.
    features (N, D); labels (N,) int64.
    """
    x, _, _ = standardize(features, np.arange(len(features)))
    probe = LinearLearner(x, torch.from_numpy(labels), n_classes=int(labels.max()) + 1)
    answers = probe.predict(probe.fit(drawn), test)
    return probes.accuracy(answers, labels[test])


def propagation_accuracy(split, convolve, labels, drawn, test):
    """Percent of the nodes `test` that label propagation gets right.

    F ← α Â F + (1 − α) Y from the labels Y of the nodes `drawn`, 30 times. α is chosen
    among these labels by five-fold cross-validation. Zhou et al. 2003, "Learning with
    Local and Global Consistency". Then each class is scaled to the same sum over all
    nodes: Zhu et al. 2003, "class mass normalization" (EXPERIMENTS.md, "Graphs": one to three
    points).
    convolve(F, links) is Â F.
    """
    classes = int(labels.max()) + 1
    fold = probes.assign_folds(labels[drawn], classes, 5)
    alphas = (0.3, 0.6, 0.8, 0.9, 0.97)
    correct = np.zeros(len(alphas))
    for a, alpha in enumerate(alphas):
        for f in range(5):
            inside, outside = drawn[fold != f], drawn[fold == f]
            answers = propagate(split, convolve, labels, inside, alpha)
            correct[a] += (answers[outside] == labels[outside]).sum()
    alpha = alphas[int(correct.argmax())]
    answers = propagate(split, convolve, labels, drawn, alpha)
    return probes.accuracy(answers[test], labels[test])


def propagate(split, convolve, labels, known, alpha):
    """The class of every node, (N,) int64, from the labels of the nodes `known`."""
    classes = int(labels.max()) + 1
    Y = torch.zeros(split.nodes, classes)
    Y[known, labels[known]] = 1
    spread = Y
    for _ in range(30):
        spread = alpha * convolve(spread, split.train) + (1 - alpha) * Y
    spread = spread / spread.sum(0).clamp(min=1e-9)
    return spread.argmax(1).numpy()


# ---------------------------------------------------------------- while it learns

def preview(codes, splits, graph):
    """The mean AUC on the links for choices, as a column of the log.

    Also prints the likeliest missing links of one node, and whether they are among the
    links for choices. The test links wait for the table.
    """
    aucs = [measure(inner_product(z), split.choices)[0] for z, split in zip(codes, splits)]
    names, held_out = graph.names, splits[0].choices[0]
    # A node many of whose links are held out, and that is not linked with everything.
    missing = held_out.flatten().bincount(minlength=len(names))
    degree = splits[0].is_known.sum(1)
    node = int((missing / (degree + 10)).argmax())
    is_link = pair_table(held_out, len(names))[node]
    partners = []
    for n in likeliest_partners(codes[0], splits[0], node):
        partners.append(f"{names[n]} ({'right' if is_link[n] else 'wrong'})")
    print(f"likeliest missing links of {names[node]}: {', '.join(partners)}")
    return dict(validation_auc=round(float(np.mean(aucs)), 2))


def likeliest_partners(z, split, node, count=5):
    """The nodes with the largest z_i · z_j that are no partner in training or test."""
    scores = z @ z[node]
    scores[split.is_known[node]] = -np.inf
    scores[pair_table(split.test[0], split.nodes)[node]] = -np.inf
    return scores.topk(count).indices.tolist()


# ---------------------------------------------------------------- the tables

def measure_links(encoders, splits):
    """{method: [(AUC, average precision) of each split]} on the test links.

    encoders: {method: [codes (N, D) of each split]}
    """
    table = {}
    has_spectrum = splits[0].nodes <= MOST_NODES_OF_SPECTRUM
    if not has_spectrum:
        print(
            f"the baseline \"spectral embedding\" is left out: {splits[0].nodes:,} nodes are "
            f"more than {MOST_NODES_OF_SPECTRUM:,}"
        )
    for n, split in enumerate(splits):
        scores = {name: inner_product(codes[n]) for name, codes in encoders.items()}
        scores["common neighbours"] = common_neighbours(split)
        scores["degree product"] = degree_product(split)
        if has_spectrum:
            scores["spectral embedding"] = spectral_embedding(split)
        for name, score in scores.items():
            table.setdefault(name, []).append(measure(score, split.test))
    return table


def measure_classes(encoders, splits, graph, settings, convolve):
    """{method: [(accuracy from 5, from 20 labels a class) of each split and draw]}, in %.

    They are predicted for all nodes with a class that are not among the 20. The links
    between nodes are those for training. encoders as above; the rest as in graph.py.
    """
    table = {}
    labels = graph.labels
    if not graph.classes:
        return table
    labelled = np.flatnonzero(labels >= 0)
    for n, split in enumerate(splits):
        for draw in range(settings.draws):
            seed = settings.seed + draw
            few = probes.draw_labels(labels, 5, seed)
            more = probes.draw_labels(labels, 20, seed)       # these five and others
            test = np.setdiff1d(labelled, more)
            for name, codes in encoders.items():
                accuracies = [
                    probe_accuracy(codes[n], labels, known, test) for known in (few, more)
                ]
                table.setdefault(name, []).append(accuracies)
            accuracies = [
                propagation_accuracy(split, convolve, labels, known, test)
                for known in (few, more)
            ]
            table.setdefault("label propagation", []).append(accuracies)
    return table


OWN = "graph autoencoder"


def print_tables(links, classes):
    """Mean and standard deviation over splits (and draws), and the line `result:`."""
    print_table("missing links, test", ["AUC", "average precision"], links)
    auc, precision = np.mean(links[OWN], axis=0)
    best, best_auc, lead = best_baseline(links, column=0)
    results = dict(
        auc=f"{auc:.1f}",
        auc_std=f"{np.std(links[OWN], axis=0, ddof=1)[0]:.1f}",
        average_precision=f"{precision:.1f}",
        best_baseline=best,
        best_baseline_auc=f"{best_auc:.1f}",
        lead=f"{lead.mean():.1f}",
        lead_std=f"{lead.std(ddof=1):.1f}",
    )
    if classes:
        print_table("class of a node, %", ["5 labels a class", "20 labels a class"], classes)
        for column, name in enumerate(["class_5_labels", "class_20_labels"]):
            best, best_accuracy, _ = best_baseline(classes, column)
            results[name] = f"{np.mean(classes[OWN], axis=0)[column]:.1f}"
            results[f"{name}_{best}"] = f"{best_accuracy:.1f}"
    print("result:", *(f"{key}={value}" for key, value in results.items()))


def best_baseline(table, column):
    """The method other than our own with the best mean in a column of the table.

    Returns its name with _ for spaces, that mean, and how far our own is above it in each
    split or draw, an array.
    """
    values = {name: np.array(rows)[:, column] for name, rows in table.items()}
    own = values.pop(OWN)
    best = max(values, key=lambda name: values[name].mean())
    return best.replace(" ", "_"), values[best].mean(), own - values[best]


def print_table(title, columns, table):
    print()
    print(f"{title:<22}", *(f"{column:>18}" for column in columns))
    for name, rows in table.items():
        cells = []
        for values in np.array(rows).T:
            cells.append(f"{values.mean():.1f} ± {values.std(ddof=1):.1f}")
        print(f"{name:<22}", *(f"{cell:>18}" for cell in cells))
