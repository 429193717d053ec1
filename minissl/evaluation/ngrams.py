"""N-grams: how far the labels carry without any pretraining.

Texts without labels only say which n-grams are frequent.

An n-gram is a sequence of n neighbouring tokens. Which n-grams a text contains says a lot about
its class, and a logistic regression on them is what a good engineer tries first. Two ways to
weigh them are common, and `NGrams` takes the one with the smaller cross-validated loss among the
labels that it is given. (This choice is not always right: on reviews it costs 1.3 points at 10
labels a class. EXPERIMENTS.md, "How strong are n-grams without pretraining?".)

    tf-idf         (1 + ln count) · idf of tokens and pairs, and each text is scaled to length 1.
                   (Triples gained nothing with up to 500 labels a class: EXPERIMENTS.md, "How
                   strong are n-grams without pretraining?".)
    naive Bayes    1 if the text contains the n-gram w. The penalty of its weight W_wc for the
                   class c is strength/2 (W_wc / r_wc)², so an n-gram that is as frequent in
                   the class as elsewhere hardly gets a weight

        r_wc = ln((α + p_wc) / Σ_w (α + p_wc)) − ln((α + q_wc) / Σ_w (α + q_wc))

Here p_wc is the number of texts of class c that contain w, and q_wc that of all other texts.
The second way is Wang and Manning 2012, "Baselines and bigrams: simple, good sentiment and topic
classification" (NB-SVM), with the loss of logistic regression.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minissl.data.texts import SAMPLE_TEXTS, add_counts
from minissl.evaluation import probes
from minissl.evaluation.probes import SparseRows


LONGEST = 3                     # tokens in an n-gram
# For naive Bayes; measured with 2 and 23 classes alone. (Set when test accuracies had been seen:
# RESULTS.md, "How to read the tables".)
MOST_CLASSES = 5
MOST_NGRAMS = 1_000_000
MOST_WEIGHTS = 20_000_000       # n-grams times classes; the search holds about 25 copies of them
TF_IDF_STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
NAIVE_BAYES_STRENGTHS = (1, 0.1, 0.01, 1e-3, 1e-4, 1e-5)


# ---------------------------------------------------------------- counts

def ngram_keys(tokens, longest, V):
    """The keys of all n-grams, n = 1 ... longest, in a text: the tokens as digits to the base V.

    tokens (T,) int64, none of which is 0 (PAD), so that two different n-grams have two keys;
    V, the size of the vocabulary. The keys are below V^longest, and int64 ends at 2^63.

    >>> ngram_keys(np.array([5, 3, 4]), 2, 10)
    array([ 5,  3,  4, 53, 34])
    """
    keys = [tokens]
    for n in range(1, longest):
        keys.append(keys[-1][:-1] * V + tokens[n:])
    return np.concatenate(keys)


def frequent_ngrams(texts, longest, most, least=2):
    """The keys of the most frequent n-grams of these Texts, n = 1 ... longest: sorted int64.

    There are at most `most`, and each occurs at least `least` times.
    """
    V = len(texts.tokenizer)
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for indices in texts.chunks(4096):
        chunk = [ngram_keys(texts[i], longest, V) for i in indices]
        chunk_counts = np.unique(np.concatenate(chunk), return_counts=True)
        keys, counts = add_counts(keys, counts, *chunk_counts)
    order = np.argsort(-counts, kind="stable")[:most]           # of equal counts, the smaller key
    chosen = order[counts[order] >= least]
    return np.sort(keys[chosen])


def count_ngrams(texts, keys, longest):
    """How often each of N texts contains each of P n-grams: SparseRows (N, P).

    texts: Texts; keys (P,) int64, sorted, of n-grams with n = 1 ... longest.
    """
    V = len(texts.tokenizer)
    keys_and_end = np.append(keys, np.iinfo(np.int64).max)      # for keys above the last one
    indices, counts, sizes = [], [], []
    for i in range(len(texts)):
        text_keys, count = np.unique(ngram_keys(texts[i], longest, V), return_counts=True)
        place = np.searchsorted(keys, text_keys)
        known = keys_and_end[place] == text_keys
        indices.append(place[known])
        counts.append(count[known].astype(np.float32))
        sizes.append(known.sum())
    offsets = np.append(0, np.cumsum(sizes))
    return SparseRows(torch.from_numpy(np.concatenate(indices)), torch.from_numpy(offsets),
                      torch.from_numpy(np.concatenate(counts)), len(keys))


# ---------------------------------------------------------------- weights

def tf_idf(counts, counted):
    """Term frequency times inverse document frequency, each row scaled to length 1.

        (1 + ln count) · (ln((1 + n) / (1 + df)) + 1)

    This is TfidfVectorizer(sublinear_tf=True) of scikit-learn. counts: SparseRows (N, V);
    counted (n,): the rows from which the document frequencies df are counted. Returns
    SparseRows.
    """
    df = torch.bincount(counts[counted].indices, minlength=counts.columns)        # (V,)
    idf = ((1 + len(counted)) / (1 + df)).log() + 1
    values = (1 + counts.values.log()) * idf[counts.indices].float()
    row = counts.row_of_entries()
    length = torch.zeros(len(counts)).index_add_(0, row, values**2).sqrt()        # (N,)
    return SparseRows(counts.indices, counts.offsets, values / length[row], counts.columns)


def naive_bayes_weights(x, labels, classes, alpha=1):
    """The log-ratios r (D, C) of the formula at the top; 0 for n-grams that no text contains.

    x: SparseRows (N, D), whose values are all 1; labels (N,) int64, or soft labels (N, C) float32,
    of which p is then the sum. The sums over w go over the n-grams that occur in these N texts.
    """
    labels = torch.as_tensor(labels)
    if labels.ndim == 1:
        labels = F.one_hot(labels, classes)
    p = torch.zeros(x.columns, classes, dtype=torch.double)               # (D, C)
    for c in range(classes):
        p[:, c].index_add_(0, x.indices, labels[:, c].double()[x.row_of_entries()])
    total = p.sum(1, keepdim=True)                                        # (D, 1)
    occurs = total > 0
    inside = (alpha + p) * occurs
    outside = (alpha + total - p) * occurs
    r = torch.log(inside / inside.sum(0)) - torch.log(outside / outside.sum(0))
    return torch.where(occurs, r, 0).float()


# ---------------------------------------------------------------- the learner

def make_ngrams(texts, counted):
    """The learner of the column "n-grams", for Texts.

    counted (n,): the texts that choose and weigh the n-grams, without their labels. None of them
    is a test text.
    """
    C, V = len(texts.classes), len(texts.tokenizer)
    longest = LONGEST if C <= MOST_CLASSES else 2               # tf-idf takes pairs alone
    most = min(MOST_NGRAMS, MOST_WEIGHTS // C)
    keys = frequent_ngrams(texts.select(counted).sample(SAMPLE_TEXTS), longest, most)
    counts = count_ngrams(texts, keys, longest)
    pairs_end = (keys < V**2).sum()                             # the keys are sorted: triples last
    return NGrams(counts, pairs_end, torch.from_numpy(texts.labels), C, counted)


class NGramModel(NamedTuple):
    """A logistic regression on n-grams."""
    weighting: str              # "tf-idf" or "naive Bayes"
    weights: torch.Tensor       # (D + 1, C)


class NGrams:
    """The learner of the column "n-grams".

    Arguments: counts, SparseRows (N, D), of the n-grams of N texts, tokens and pairs first;
    pairs_end, how many of the D columns are tokens and pairs; labels (N,) int64; n_classes;
    counted (n,), the texts from which tf-idf takes its document frequencies, without
    their labels.
    """

    def __init__(self, counts, pairs_end, labels, n_classes, counted):
        self.labels = labels
        self.n_classes = n_classes
        self.rows = {"tf-idf": tf_idf(counts.first_columns(pairs_end), counted)}
        if n_classes <= MOST_CLASSES:
            ones = torch.ones_like(counts.values)
            self.rows["naive Bayes"] = SparseRows(
                counts.indices, counts.offsets, ones, counts.columns)

    def fit(self, indices):
        """An NGramModel with the weighting that has the least cross-validated loss.

        With one label a class nothing can be held out, and it is tf-idf.
        """
        labels, classes = self.labels[indices], self.n_classes
        tf_idf_fit = probes.cross_validate(
            self.rows["tf-idf"][indices], labels, classes, TF_IDF_STRENGTHS)
        if "naive Bayes" not in self.rows:
            return NGramModel("tf-idf", tf_idf_fit.weights)
        bayes_fit = probes.cross_validate(
            self.rows["naive Bayes"][indices], labels, classes, NAIVE_BAYES_STRENGTHS,
            partial(naive_bayes_weights, classes=classes))
        if bayes_fit.loss < tf_idf_fit.loss:
            return NGramModel("naive Bayes", bayes_fit.weights)
        return NGramModel("tf-idf", tf_idf_fit.weights)

    def logits(self, model, indices):
        """The logits (n, C) of an NGramModel for these texts."""
        return probes.linear_logits(self.rows[model.weighting][indices], model.weights)

    def predict(self, model, indices):
        return self.logits(model, indices).argmax(1)
