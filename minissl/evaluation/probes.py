"""How good are features? Nearest neighbours, linear probes and draws of labels.

Three rules make an evaluation honest, and this file keeps them:

- A function sees the labels that it is given and no others.
- Choices, such as the strength of the penalty, are made by cross-validation among those labels.
- Among the functions of this file, labels of the test set reach `accuracy` alone.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


def accuracy(predictions, labels):
    """Percent of the (N,) predictions that equal the (N,) labels. Every example counts."""
    correct = torch.as_tensor(predictions) == torch.as_tensor(labels)
    return 100 * float(correct.double().mean())


def draw_labels(labels, per_class, seed):
    """Draw examples whose labels may be used: `per_class` of each class, without replacement.

    labels (N,) int64, -1 for an example without a label; per_class None draws all.
    Returns sorted indices (n,) int64. Raises ValueError if a class has too few examples.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    drawn = []
    for c in range(labels.max() + 1):
        indices = np.flatnonzero(labels == c)
        if per_class is not None and len(indices) < per_class:
            raise ValueError(f"class {c} has {len(indices)} labelled examples, not {per_class}")
        drawn.append(rng.permutation(indices)[:per_class])
    return np.sort(np.concatenate(drawn))


# ---------------------------------------------------------------- nearest neighbours

VOTE_TEMPERATURE = 0.07


def knn_accuracy(features, labels, queries, query_labels, k=20):
    """Percent of the queries (Q, D) whose k nearest features (N, D) vote for the right label.

    Nearness is the cosine after the mean of the features is subtracted. Each neighbour's vote
    has the weight exp(cosine / VOTE_TEMPERATURE): Wu et al. 2018, arXiv 1805.01978, section 3.4.
    """
    centre = features.mean(0)
    keys = F.normalize(features - centre, dim=1)                # (N, D)
    similarity = F.normalize(queries - centre, dim=1) @ keys.T  # (Q, N)
    cosine, neighbour = similarity.topk(min(k, len(features)), dim=1)  # (Q, k)

    labels = torch.as_tensor(labels)
    votes = torch.zeros(len(queries), int(labels.max()) + 1)    # (Q, C)
    votes.scatter_add_(1, labels[neighbour], (cosine / VOTE_TEMPERATURE).exp())
    return accuracy(votes.argmax(1), query_labels)


# ---------------------------------------------------------------- sparse rows

@dataclass
class SparseRows:
    """A matrix (N, D) that is mostly zero. Only its entries are stored, row after row.

        [[0, 2, 0],      offsets  0     1     3     where each row begins, and the end
         [1, 0, 3]]      indices  1  |  0  2        the column of each entry
                         values   2  |  1  3

    Products are F.embedding_bag: row n of A @ B is the sum of those rows of B that row n of A
    names, each times its value. (torch.sparse has the same format, but not on every device.)
    """
    indices: torch.Tensor       # (entries,) int64
    offsets: torch.Tensor       # (N + 1,) int64
    values: torch.Tensor        # (entries,) float32
    columns: int                # D

    def __len__(self):
        return len(self.offsets) - 1

    @property
    def shape(self):
        return len(self), self.columns

    def row_of_entries(self):
        """The row of each entry, (entries,) int64."""
        return torch.arange(len(self)).repeat_interleave(self.offsets.diff())

    def __getitem__(self, rows):
        """The given rows, (n,) int64, as SparseRows, in the order given."""
        rows = torch.as_tensor(rows)
        sizes = self.offsets[rows + 1] - self.offsets[rows]               # (n,)
        offsets = F.pad(sizes.cumsum(0), (1, 0))                          # (n + 1,)
        shifts = (self.offsets[rows] - offsets[:-1]).repeat_interleave(sizes)
        entries = torch.arange(len(shifts)) + shifts
        return SparseRows(self.indices[entries], offsets, self.values[entries], self.columns)

    def __matmul__(self, dense):
        """The product with a dense (D, C) float32 matrix, (N, C), with gradient."""
        return F.embedding_bag(self.indices, dense, self.offsets, mode="sum",
                               per_sample_weights=self.values, include_last_offset=True)

    def transpose(self):
        """The (D, N) matrix with rows and columns exchanged."""
        order = self.indices.argsort(stable=True)
        sizes = self.indices.bincount(minlength=self.columns)             # (D,)
        offsets = F.pad(sizes.cumsum(0), (1, 0))
        rows = self.row_of_entries()
        return SparseRows(rows[order], offsets, self.values[order], len(self))

    def first_columns(self, n):
        """The first n columns, as SparseRows."""
        kept = self.indices < n
        row = self.row_of_entries()[kept]
        sizes = row.bincount(minlength=len(self))                         # (N,)
        offsets = F.pad(sizes.cumsum(0), (1, 0))
        return SparseRows(self.indices[kept], offsets, self.values[kept], n)

    def to_dense(self):
        """The whole matrix, (N, D) float32."""
        dense = torch.zeros(self.shape)
        dense[self.row_of_entries(), self.indices] = self.values
        return dense


# ---------------------------------------------------------------- logistic regression

def logistic_regression(x, labels, classes, strength, start=None, tolerance=1e-5,
                        weight_scale=None):
    """Weights (D + 1, C) that minimize  mean cross-entropy + strength/2 ‖W / S‖².

    The last row is the bias, which is not penalized. x: (N, D) float32, dense or SparseRows;
    labels (N,) int64, or (N, C) float32: then the loss is −1/N Σ_n Σ_c labels[n, c] log p[n, c]
    and the rows need not sum to 1; classes C; start (D + 1, C), where the search begins;
    weight_scale, the S of the penalty, (D, C) or (D, 1), or None for ones. A weight with a
    larger scale is penalized less. A weight with the scale 0 stays 0.

    The loss is convex, so L-BFGS finds its minimum from any start. (The minimum is unique up to
    a constant that is added to all biases.) It ends when no entry of the gradient by v (see
    `minimize`) is above `tolerance`, when the loss or v moves by less than 1e-9, or after 200
    iterations (250 evaluations of the loss).
    """
    D = x.shape[1]
    labels = torch.as_tensor(labels)
    if start is None:
        start = torch.zeros(D + 1, classes)
    if weight_scale is None:
        weight_scale = torch.ones(D, 1)
    if not isinstance(x, SparseRows):
        return minimize(x, labels, strength, start, tolerance, weight_scale)

    # A term that no example contains gets the weight 0, so the search leaves it out.
    used, indices = x.indices.unique(return_inverse=True)
    x = SparseRows(indices, x.offsets, x.values, len(used))
    searched = torch.cat([used, torch.tensor([D])])
    weights = minimize(x, labels, strength, start[searched], tolerance, weight_scale[used])
    return torch.zeros(D + 1, classes).index_copy(0, searched, weights)


def minimize(x, labels, strength, start, tolerance, weight_scale):
    """The search of `logistic_regression`, with a row of weights for each column of x (N, D).

        W = S · u               the weights; S is the weight_scale of the caller
        u                       what the penalty sees
        u = step_scale · v      v is what L-BFGS moves (diagonal preconditioning)

    A column with large values has a steep slope, and one with small values a shallow one. The
    step_scale makes them nearly equal. This does not move the minimum, but makes the search
    short, above all if the columns are principal axes, as in `cross_validate`.
    """
    targets = labels                                                      # (N, C)
    if labels.ndim == 1:
        targets = F.one_hot(labels, start.shape[1]).float()
    total = targets.sum(1, keepdim=True)                                  # (N, 1)
    product, transposed_product = products(x)
    # p (1 − p) is about 0.1 for ten equally likely classes. Only the speed depends on it.
    curvature = 0.1 * mean_squares(x)[:, None] * weight_scale**2          # of the loss, at u
    step_scale = (curvature + strength).rsqrt()
    step_scale = F.pad(step_scale, (0, 0, 0, 1), value=1)                 # the bias: 1
    weight_scale = F.pad(weight_scale, (0, 0, 0, 1), value=1)             # (D + 1, C) or (D + 1, 1)
    start_u = torch.where(weight_scale == 0, 0, start / weight_scale)     # (D + 1, C)
    v = (start_u / step_scale).requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=200, history_size=10,
                                  tolerance_grad=tolerance, line_search_fn="strong_wolfe")

    @torch.no_grad()
    def loss_and_gradient():
        u = v * step_scale
        weights = u * weight_scale
        logits = product(weights[:-1]) + weights[-1]                      # (N, C)
        error = (total * logits.softmax(1) - targets) / len(labels)       # d loss / d logits
        gradient = torch.cat([transposed_product(error), error.sum(0, keepdim=True)])
        gradient = gradient * weight_scale                                # d loss / d u
        gradient[:-1] += strength * u[:-1]
        v.grad = gradient * step_scale
        penalty = strength / 2 * u[:-1].square().sum()
        # In float32 the last gains of the search would be lost in rounding.
        return F.cross_entropy(logits.double(), targets.double()) + penalty

    optimizer.step(loss_and_gradient)
    return v.detach() * step_scale * weight_scale


def mean_squares(x):
    """The mean of the squared values of each column of x (N, D), dense or SparseRows: (D,)."""
    if isinstance(x, SparseRows):
        sums = torch.zeros(x.columns).index_add_(0, x.indices, x.values**2)
        return sums / len(x)
    return x.square().mean(0)


def principal_axes(x):
    """Orthonormal columns (D, min(N, D)) whose span contains the rows of x (N, D).

    They are the eigenvectors of xᵀx, from the smallest eigenvalue to the largest. x is not
    centred.
    """
    N, D = x.shape
    if D <= N:
        return torch.linalg.eigh(x.T @ x).eigenvectors
    span, _ = torch.linalg.qr(x.T)                                        # (D, N)
    return span @ principal_axes(x @ span)


def products(x):
    """Two functions for a matrix x (N, D): w (D, C) -> x w (N, C) and e (N, C) -> xᵀ e (D, C)."""
    if isinstance(x, SparseRows):
        return x.__matmul__, x.transpose().__matmul__

    def product(w):
        return (w.T @ x.T).T

    def transposed_product(error):
        return (error.T @ x).T

    # With few columns C on a CPU, (error.T @ x).T is 3 to 9 times as fast as x.T @ error.
    return product, transposed_product


LABEL_WEIGHT = 0.5      # of n labels beside guesses; see `weighted_targets`


def weighted_targets(guesses, one_hot):
    """Targets of `logistic_regression`, (U + n, C), from soft labels and labels.

    guesses (U, C); one_hot (n, C). A guess weighs 1, and a label 1 + LABEL_WEIGHT · U / n. So all
    guesses together weigh U, and all labels n + U / 2. Then all rows are scaled to the mean
    weight 1.
    """
    label_weight = 1 + LABEL_WEIGHT * len(guesses) / len(one_hot)
    targets = torch.cat([guesses, label_weight * one_hot])
    return targets * (len(targets) / targets.sum())


def linear_logits(x, weights):
    """The logits (N, C) of x (N, D), dense or SparseRows, for weights (D + 1, C)."""
    return x @ weights[:-1] + weights[-1]


@dataclass
class LinearModel:
    """A fitted logistic regression."""
    weights: torch.Tensor       # (D + 1, C), the last row is the bias
    strength: float             # of its penalty
    # What models of the same kind lose on average on unseen examples: those of the folds left
    # out. nan if there were none.
    loss: float = math.nan


ONE_FOLD_ABOVE = 5000


def cross_validate(x, labels, classes, strengths, weight_scale_of=None):
    """Logistic regression whose strength is chosen by five-fold cross-validation.

    The choice uses these labels alone and takes the strength with the least loss. Above
    ONE_FOLD_ABOVE labels one of the five folds decides: 1,000 examples are enough for it.
    x (N, D) dense or SparseRows; labels (N,) int64; strengths from strong to weak; weight_scale_of,
    for SparseRows: a function from (x, labels) of the examples that are fitted to the weight_scale
    of `logistic_regression`. Returns a LinearModel.
    """
    labels = np.asarray(labels)
    is_sparse = isinstance(x, SparseRows)
    if not is_sparse:
        # The penalty keeps W in the span of the rows of x, and turning the axes changes no
        # length. So the search may use the principal axes, of which there are at most N.
        axes = principal_axes(x)                                          # (D, min(N, D))
        x = x @ axes
    fold = assign_folds(labels, classes, 5)
    losses = np.zeros(len(strengths))
    nearby = [None] * len(strengths)            # where the final fit starts
    held_out = 0
    for f in range(5 if len(labels) <= ONE_FOLD_ABOVE else 1):
        inside = np.flatnonzero(fold != f)
        outside = np.flatnonzero(fold == f)
        # An example whose class is not inside says nothing about the strength. With one label a
        # class no example is left, and the strongest is taken.
        outside = outside[np.isin(labels[outside], labels[inside])]
        if len(outside) == 0:
            continue
        held_out += len(outside)
        x_inside, x_outside = x[inside], x[outside]
        y_outside = torch.from_numpy(labels[outside])
        scale = weight_scale_of(x_inside, labels[inside]) if weight_scale_of else None
        weights = None
        for i, strength in enumerate(strengths):
            # The solution for one strength is a good start for the next.
            weights = logistic_regression(x_inside, labels[inside], classes, strength, weights,
                                          tolerance=1e-4, weight_scale=scale)
            logits = linear_logits(x_outside, weights)
            losses[i] += float(F.cross_entropy(logits, y_outside, reduction="sum"))
            nearby[i] = weights

    best = int(losses.argmin())
    scale = weight_scale_of(x, labels) if weight_scale_of else None
    weights = logistic_regression(x, labels, classes, strengths[best], nearby[best],
                                  weight_scale=scale)
    if not is_sparse:
        weights = torch.cat([axes @ weights[:-1], weights[-1:]])
    loss = losses[best] / held_out if held_out else math.nan
    return LinearModel(weights, strengths[best], loss)


def assign_folds(labels, classes, folds):
    """The fold of each example (N,), at random, with every class spread evenly over the folds."""
    order = np.random.default_rng(0).permutation(len(labels))
    fold = np.empty(len(labels), int)
    for c in range(classes):
        indices = order[labels[order] == c]
        fold[indices] = np.arange(len(indices)) % folds
    return fold
