"""What are features worth? Nearest neighbours, linear probes, label draws, and what a user would do instead.

Every function here sees the labels that it is given and no others. Choices (the strength of the regularisation) are
made by cross-validation inside the labels drawn; test labels only ever meet `accuracy`.
"""

import json
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from minissl import figures, transformer
from minissl.datasets import HELD_OUT, TRAIN
from minissl.files import write_atomically
from minissl.tokenizer import MASK, PAD
from minissl.training import diverged, generator


def accuracy(predictions, labels):
    """Percent of (N,) predictions that equal the (N,) labels, every one counted."""
    return 100 * float((torch.as_tensor(predictions) == torch.as_tensor(labels)).double().mean())


def draw_labels(labels, per_class, seed):
    """Indices of `per_class` examples of each class, drawn without replacement, sorted; None draws all.

    labels (N,) int64, -1 where there is none. Raises ValueError naming the class that has too few.
    """
    labels, generator = np.asarray(labels), np.random.default_rng(seed)
    drawn = []
    for c in range(labels.max() + 1):
        where = np.flatnonzero(labels == c)
        if per_class is not None and len(where) < per_class:
            raise ValueError(f"class {c} has {len(where)} labelled examples, not {per_class}")
        drawn.append(generator.permutation(where)[:per_class])
    return np.sort(np.concatenate(drawn))


def knn_accuracy(features, labels, queries, query_labels, k=20):
    """Percent of the (Q, D) queries whose k nearest of the (N, D) features vote for the right label: by cosine, after
    the mean of the features is subtracted.

    Wu et al. 2018, arXiv 1805.01978, section 3.4, with each neighbour's vote weighted by exp(cosine / 0.07).
    """
    centre = features.mean(0)
    similarity = F.normalize(queries - centre, dim=1) @ F.normalize(features - centre, dim=1).T   # (Q, N)
    weight, index = similarity.topk(min(k, len(features)), dim=1)                                 # (Q, k)
    labels = torch.as_tensor(labels)
    votes = torch.zeros(len(queries), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[index], (weight / 0.07).exp())
    return accuracy(votes.argmax(1), query_labels)


# ---------------------------------------------------------------- the linear probe

def logistic_regression(x, labels, classes, strength, start=None, tolerance=1e-5):
    """Weights (D + 1, C) that minimise mean cross-entropy + strength/2 ‖W‖², the last row the unpenalised bias.

    x (N, D) float32, dense or sparse CSR; labels (N,) int64. Convex: L-BFGS finds the one minimum from any `start`
    (D + 1, C), until no slope is above `tolerance`, float32 shows no more gain, or 200 iterations are made.
    """
    D, labels = x.shape[1], torch.as_tensor(labels)
    start = torch.zeros(D + 1, classes) if start is None else start
    if x.layout != torch.strided:      # a term that none of these texts holds gets weight 0: leave it out of the search
        used, column = x.col_indices().unique(return_inverse=True)
        x = csr(x.crow_indices(), column, x.values(), (len(labels), len(used)))
        rows = torch.cat([used, torch.tensor([D])])
        found = minimise(x, labels, strength, start[rows], tolerance)
        return torch.zeros(D + 1, classes).index_copy(0, rows, found)
    if D > len(labels):                # the penalty keeps W in the examples' span: search there
        basis, _ = torch.linalg.qr(x.T)                                       # (D, N)
        found = minimise(x @ basis, labels, strength, torch.cat([basis.T @ start[:-1], start[-1:]]), tolerance)
        return torch.cat([basis @ found[:-1], found[-1:]])
    return minimise(x, labels, strength, start, tolerance)


def minimise(x, labels, strength, start, tolerance):
    """The search of `logistic_regression` for a matrix x (N, D) as it is."""
    if x.layout == torch.strided:      # x @ w and x.T @ error take 1.6 and 7 times as long, for few columns on a CPU
        product, transposed_product = lambda w: (w.T @ x.T).T, lambda error: (error.T @ x).T
    else:
        x_transposed = x.to_sparse_coo().T.coalesce().to_sparse_csr()
        product, transposed_product = lambda w: x @ w, lambda error: x_transposed @ error
    weights = start.clone().requires_grad_()                                  # (D + 1, C)
    wanted = F.one_hot(labels, weights.shape[1]).float()                      # (N, C)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, history_size=10, tolerance_grad=tolerance,
                                  line_search_fn="strong_wolfe")

    @torch.no_grad()
    def loss_and_gradient():
        logits = product(weights[:-1]) + weights[-1]                          # (N, C)
        error = (logits.softmax(1) - wanted) / len(labels)                    # d loss / d logits
        weights.grad = torch.cat([transposed_product(error) + strength * weights[:-1], error.sum(0, keepdim=True)])
        return F.cross_entropy(logits, labels) + strength / 2 * weights[:-1].square().sum()

    optimizer.step(loss_and_gradient)
    return weights.detach()


def predict(x, weights):
    return x @ weights[:-1] + weights[-1]


def probe(x, labels, classes, strengths):
    """Logistic regression whose strength five-fold cross-validation chooses, by its loss, inside these labels.

    strengths: from strong to weak. -> (weights (D + 1, C), the strength). Above 5,000 labels one fold decides: there
    the choice is not close.
    """
    labels = np.asarray(labels)
    order, fold = np.random.default_rng(0).permutation(len(labels)), np.empty(len(labels), int)
    for c in range(classes):                                                  # each class spread evenly over the folds
        where = order[labels[order] == c]
        fold[where] = np.arange(len(where)) % 5
    losses, near = np.zeros(len(strengths)), [None] * len(strengths)
    for f in range(5 if len(labels) <= 5000 else 1):
        inside, outside = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        x_in, x_out, y_out = rows(x, inside), rows(x, outside), torch.from_numpy(labels[outside])
        weights = None                                                        # from one strength to the next is not far
        for i, strength in enumerate(strengths):
            near[i] = weights = logistic_regression(x_in, labels[inside], classes, strength, weights, tolerance=1e-4)
            losses[i] += float(F.cross_entropy(predict(x_out, weights), y_out, reduction="sum"))
    best = int(losses.argmin())
    return logistic_regression(x, labels, classes, strengths[best], near[best]), strengths[best]


# ---------------------------------------------------------------- sparse counts: the baseline's and fine-tuner's view

def csr(start, column, value, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                       # "beta state": what we use is tested
        return torch.sparse_csr_tensor(*map(torch.as_tensor, (start, column, value)), shape)


def rows(x, which):
    """The rows `which` of a dense or CSR matrix."""
    which = torch.as_tensor(which)
    if x.layout == torch.strided:
        return x[which]
    start, column, value = x.crow_indices(), x.col_indices(), x.values()
    size = start[which + 1] - start[which]
    first = size.cumsum(0) - size
    index = torch.repeat_interleave(start[which] - first, size) + torch.arange(int(size.sum()))
    return csr(torch.cat([first, size.sum()[None]]), column[index], value[index], (len(which), x.shape[1]))


def tf_idf(counts, fit):
    """Term frequency × inverse document frequency, each row of length 1: (1 + ln count) · (ln((1 + n)/(1 + df)) + 1).

    counts CSR (N, V); fit, the rows from which the document frequencies come. (As scikit-learn's
    TfidfVectorizer(sublinear_tf=True) has it.)
    """
    present = rows(counts, fit)
    df = torch.bincount(present.col_indices(), minlength=counts.shape[1])
    idf = ((1 + len(fit)) / (1 + df)).log() + 1
    value = (1 + counts.values().log()) * idf[counts.col_indices()].float()
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts.crow_indices().diff())
    length = torch.zeros(len(counts)).index_add_(0, owner, value**2).sqrt()
    return csr(counts.crow_indices(), counts.col_indices(), value / length[owner], counts.shape)


def term_counts(texts, pairs):
    """How often each of N texts holds each token, and each of the `pairs` (P,) of neighbours, left · V + right, sorted:
    CSR (N, V + P)."""
    V = len(texts.tokenizer)
    keys, terms = [], V + len(pairs)                                          # text · (V + P) + term, once each time
    last = np.append(pairs, np.iinfo(np.int64).max)                           # so each pair has a place
    for part in texts.slices(4096):
        tokens, owner = texts.flat(part)
        pair = tokens[:-1] * V + tokens[1:]                                   # one with PAD in it is none of `pairs`
        place = np.searchsorted(last, pair)
        word, known = tokens != PAD, last[place] == pair
        keys += [part[owner[word]] * terms + tokens[word], part[owner[1:][known]] * terms + V + place[known]]
    key, count = np.unique(np.concatenate(keys), return_counts=True)
    start = np.searchsorted(key, np.arange(len(texts) + 1) * terms)
    return csr(start, key % terms, count.astype(np.float32), (len(texts), terms))


# ---------------------------------------------------------------- features of texts

@torch.no_grad()
def text_features(model, texts, cast, device="cpu", progress=lambda line: None):
    """model.encode(tokens (B, T), lengths (B,)) over all of each text -> (N, d) float32, on the CPU. A text that is
    longer than the model's window is read in nearly equal parts; its features are the mean of theirs, by length."""
    windows, features = texts.cut(model.window), torch.zeros(len(texts), model.document_columns)
    owner = np.repeat(np.arange(len(texts)), -(-texts.lengths // model.window))                   # (W,)
    order, begin = np.argsort(-windows.lengths, kind="stable"), 0             # like lengths share a batch
    while begin < len(order):
        which = order[begin:begin + max(1, 2**15 // windows.lengths[order[begin]])]
        tokens, lengths = map(torch.from_numpy, windows.padded(which))
        with cast:
            part = model.encode(tokens.to(device), lengths.to(device)).cpu()  # (B, d)
        share = lengths / torch.from_numpy(texts.lengths[owner[which]])       # (B,) of its text
        features.index_add_(0, torch.from_numpy(owner[which]), part * share[:, None])
        begin += len(which)
        progress(f"encoding: {begin:,} of {len(order):,} windows")
    return features


@torch.no_grad()
def image_features(encode, images, cast, device="cpu", progress=lambda line: None, batch=250):
    """encode(x (B, C, H, W), floats in [0, 1]) over all of a uint8 tensor or Images -> (N, D) float32, on the CPU."""
    features = []
    for begin in range(0, len(images), batch):
        with cast:
            features.append(encode(images[begin:begin + batch].to(device).float() / 255).float().cpu())
        progress(f"encoding: {min(begin + batch, len(images)):,} of {len(images):,} images")
    return torch.cat(features)


class Neighbours:
    """Called with an encoder during training: the nearest neighbours of held-out images among training images.
    -> their accuracy where labels exist (for the log alone), and neighbours.png and map.png in the run's folder."""

    def __init__(self, data, device):
        self.device, self.known, self.asked = device, data.of(TRAIN, 2000), data.of(HELD_OUT, 500)

    def __call__(self, encode, cast, folder):
        known, asked = (image_features(encode, part, cast, self.device) for part in (self.known, self.asked))
        if not (known.isfinite().all() and asked.isfinite().all()):
            raise diverged("features are", "at a look at held-out images", folder)
        queries, others = (F.normalize(part - known.mean(0), dim=1) for part in (asked, known))
        nearest = (queries[:10] @ others.T).topk(min(8, len(others))).indices                               # (10, 8)
        rows = [torch.cat([image[None], self.known[row]]) for image, row in zip(self.asked[:10], nearest)]
        labels = [np.append(label, self.known.labels[row]) for label, row in zip(self.asked.labels, nearest.numpy())]
        figures.write_png(folder / "neighbours.png", figures.grid(rows, labels))
        points = queries @ torch.linalg.svd(queries, full_matrices=False)[2][:2].T                          # (Q, 2)
        figures.write_png(folder / "map.png", figures.scatter(points.numpy(), self.asked.labels))
        if min(self.known.labels.min(), self.asked.labels.min()) < 0:
            return ""
        return round(knn_accuracy(known, self.known.labels, asked, self.asked.labels), 2)


# ---------------------------------------------------------------- what a masked language model has learned so far

class MaskedText:
    """Called with a model: held-out masked loss, bits per byte and accuracy; k-nearest-neighbour accuracy where labels
    exist (for the log alone). Prints two passages with what the model puts for their masks, keeps six for the page."""

    def __init__(self, texts, window, share, folder, cast, device):
        self.folder, self.cast, self.device, self.tokenizer = folder, cast, device, texts.tokenizer
        held_out = texts.select(texts.split == HELD_OUT)
        if not len(held_out):
            print("too few texts to hold one out: the held-out loss below is of texts that are trained on")
            held_out = texts
        held_out = held_out.cut(window).spaced(512)
        self.tokens, self.lengths = map(torch.from_numpy, held_out.padded(np.arange(len(held_out))))
        self.inputs, self.positions, self.targets = transformer.mask_tokens(
            self.tokens, self.lengths, len(texts.tokenizer), share, generator(0, "held-out masks", 0))
        self.bytes = sum(len(self.tokenizer.bytes_of[token]) for token in self.targets.tolist())
        labelled = [texts.select((texts.split == split) & (texts.labels >= 0)).spaced(most)
                    for split, most in ((TRAIN, 1000), (HELD_OUT, 500))]
        self.labelled = labelled if all(map(len, labelled)) else None

    @torch.no_grad()
    def __call__(self, model):
        with self.cast:
            x = torch.cat([model(inputs.to(self.device), lengths.to(self.device))
                           for inputs, lengths in zip(self.inputs.split(64), self.lengths.split(64))])
            loss, guesses = 0.0, []
            masked = x.flatten(0, 1)[self.positions.to(self.device)]          # (M, D)
            for hidden, targets in zip(masked.split(1024), self.targets.split(1024)):
                logits = model.token_logits(hidden).float().cpu()             # (m, V): all at once, a third of a GB
                loss += transformer.masked_language_model_loss(logits, targets, len(self.targets)).item()
                guesses.append(logits.argmax(1))
        guesses = torch.cat(guesses)                                          # (M,)
        result = dict(held_out=round(loss, 4), bits_per_byte=round(loss / math.log(2) * len(guesses) / self.bytes, 4),
                      accuracy=round(accuracy(guesses, self.targets), 2), knn="")
        if self.labelled:
            a, b = (text_features(model, part, self.cast, self.device) for part in self.labelled)
            result["knn"] = round(knn_accuracy(a, self.labelled[0].labels, b, self.labelled[1].labels), 2)
        passages = self.passages(guesses)
        for text, wanted, got in passages[:2]:
            print(f"    {text}\n    wanted {', '.join(wanted)} | got {', '.join(got)}", flush=True)
        write_atomically(self.folder / "sentences.json", json.dumps(passages).encode())
        return result

    def passages(self, guesses, show=6, length=24):
        """[(text with [MASK], what stood there, what the model puts), ...]"""
        row, place = self.positions // self.tokens.shape[1], self.positions % self.tokens.shape[1]               # (M,)
        name, found = lambda token: self.tokenizer.decode([int(token)]), []
        for r in row[self.lengths[row] >= length].unique()[::7][:show]:
            asked = ((row == r) & (place < length)).nonzero().flatten()
            text = self.tokens[r, :length].index_fill(0, place[asked], MASK)
            found.append((self.tokenizer.decode(text.tolist()), [name(t) for t in self.targets[asked]],
                          [name(t) for t in guesses[asked]]))
        return found
