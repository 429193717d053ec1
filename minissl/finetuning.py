"""What finetune.py compares: for texts and for images, the columns of its table.

A task knows the examples, which of them are for training, for choices and for the test, and a column, `Column` or
`Linear`, for each way to get a classifier from a few labels. A column's fit sees the labels of the examples that it is
given, and no others.

How a text encoder is fine-tuned here. The document vector is a mean of token vectors, and each token vector its
embedding plus what the blocks add from the context. Fine-tuning moves the embeddings, where what a label says about
a word belongs; the blocks' part is computed once and stays, so a step is a product with the counts of words.
From scratch the blocks' last matrices are zero, so there the model is its embeddings.

An image encoder is fine-tuned whole. With few labels its batch norm stays as pretraining left it: a hundred images say
little about means and deviations (a prototype lost 3 points when they moved).
"""

import shlex
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minissl import UserError, contrastive, evaluation, runs, transformer
from minissl.datasets import HELD_OUT, TEST, TRAIN, evenly, frequent_pairs, texts_of
from minissl.documents import read_texts
from minissl.files import progress, read_checkpoint
from minissl.images import own_images
from minissl.muon import Muon
from minissl.training import Batches, generator, rate_at, take_step


@dataclass
class Column:
    fit: Callable           # (which, option, seed) -> a fitted model; `which`: the examples whose labels it may see
    answers: Callable       # (fitted model, which) -> (n,) classes
    options: Callable       # number of labels -> what to choose among on held-out examples


PROBE_STRENGTHS, TF_IDF_STRENGTHS = (3, 1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001), (1e-2, 1e-3, 1e-4, 3e-5, 1e-5)


class Linear:
    """The column of a logistic regression on rows(which) (n, D), its strength by cross-validation among the labels."""

    def __init__(self, rows, labels, classes, strengths=PROBE_STRENGTHS):
        self.rows, self.labels, self.classes, self.strengths, self.found = rows, labels, classes, strengths, {}

    def fit(self, which, option=None, seed=None):
        """-> (weights (D + 1, C), strength). Answers are kept: the fine-tuned column asks for the probe's."""
        key = np.asarray(which).tobytes()
        if key not in self.found:
            self.found[key] = evaluation.probe(self.rows(which), self.labels[which], self.classes, self.strengths)
        return self.found[key]

    def answers(self, fitted, which):
        return torch.cat([evaluation.predict(self.rows(part), fitted[0]).argmax(1)
                          for part in np.array_split(which, max(1, len(which) // 10_000))])

    def options(self, n):
        return [None]


def standardised(x, pool):
    """Each column of x (N, D) with mean 0 and deviation 1 over the rows `pool`. -> that, mean (D,), deviation (D,)"""
    mean, deviation = x[pool].mean(0), x[pool].std(0, correction=0).clamp(min=1e-6)
    return (x - mean) / deviation, mean, deviation


class Classifier(nn.Module):
    """body.encode, (B, D), standardised, and a linear layer -> logits (B, C). weights (D + 1, C), like a probe's, are
    where that layer starts."""

    def __init__(self, body, mean, deviation, weights):
        super().__init__()
        self.body = body
        self.register_buffer("mean", mean)                                    # (D,) of the unlabelled pool's features
        self.register_buffer("deviation", deviation)                          # (D,)
        self.head = nn.Linear(*weights[:-1].shape)
        self.head.load_state_dict(dict(weight=weights[:-1].T, bias=weights[-1]))

    def forward(self, *inputs):
        return self.head((self.body.encode(*inputs) - self.mean) / self.deviation)


# ---------------------------------------------------------------- texts

class Embeddings(nn.Module):
    """Counts of words and pairs (B, V + P), and what the blocks add to the document vector (B, d), times `blocks`
    -> features (B, d)."""

    def __init__(self, table, blocks=1):
        super().__init__()
        self.table, self.blocks = nn.Parameter(table.clone()), blocks         # (V + P, d)

    def encode(self, counts, context, words):
        return transformer.norm(counts @ self.table / words + self.blocks * context)


class TextTask:
    """Of N texts: counts (N, V + P) sparse, words (N, 1), features (N, d), context (N, d) = what the blocks add to the
    mean of embeddings, z (N, d) = normed, standardised features, labels (N,), and which are train, held_out, test."""

    trials = 3                          # draws of labels on which an option is tried
    rows = ["10", "100", "500", "all"]  # of the table

    def __init__(self, texts, model, cast, device):
        self.features = evaluation.text_features(model.to(device), texts, cast, device, progress)
        model.cpu()
        self.counts = evaluation.term_counts(texts, model.pairs.numpy())
        self.words = torch.from_numpy(texts.lengths).float()[:, None]
        self.table = model.term_table().detach()                              # (V + P, d)
        self.context = self.features - self.counts @ self.table / self.words
        self.texts, self.labels, self.classes = texts, torch.from_numpy(texts.labels), texts.classes
        self.train, self.held_out, self.test = (np.flatnonzero(texts.split == s) for s in (TRAIN, HELD_OUT, TEST))
        self.z, self.mean, self.deviation = standardised(transformer.norm(self.features), self.train)
        self.probe = Linear(self.z.__getitem__, self.labels, len(self.classes))
        self.spread = float(self.features[self.train].std(0, correction=0).mean())

    def columns(self):
        """{name: Column or Linear}, in the table's order."""
        known, classes = np.concatenate([self.train, self.held_out]), len(self.classes)
        pairs = frequent_pairs(self.texts.select(known), 200_000, least=1)
        words = evaluation.tf_idf(evaluation.term_counts(self.texts, pairs.numpy()), known)
        return {"tf-idf": Linear(partial(evaluation.rows, words), self.labels, classes, TF_IDF_STRENGTHS),
                "from scratch": Column(self.fit_from_scratch, self.answers, partial(rates_and_epochs, SCRATCH_RATES)),
                "linear probe": self.probe,
                "fine-tuned": Column(self.fit_fine_tuned, self.answers, partial(rates_and_epochs, TUNED_RATES))}

    def fit_from_scratch(self, which, option, seed):
        (rate, epochs), d, C = option, len(self.mean), len(self.classes)
        table = 0.1 * torch.randn(self.table.shape, generator=generator(seed, "from scratch", 0))
        classifier = Classifier(Embeddings(table, blocks=0), torch.zeros(d), torch.ones(d), torch.zeros(d + 1, C))
        return self.train_classifier(classifier, which, rate, 0.1, epochs, 0, seed)

    def fit_fine_tuned(self, which, option, seed):
        (rate, epochs), (weights, strength) = option, self.probe.fit(which)
        classifier = Classifier(Embeddings(self.table), self.mean, self.deviation, weights)
        return self.train_classifier(classifier, which, rate, self.spread, epochs, strength, seed)

    def train_classifier(self, model, which, rate, unit, epochs, strength, seed):
        """Train all of `model` on the texts `which`: Adam, the rate linear to 0. The embeddings' rate is `rate` times
        `unit`, the spread of what they have to move (the vectors of the blocks can be a thousand times longer than
        theirs); `strength` is the head's L2 penalty, as in the probe."""
        size = min(64, len(which))
        steps = max(1, epochs * len(which) // size) if rate else 0
        optimizer = torch.optim.Adam([dict(params=model.body.parameters(), times=rate * unit), dict(
            params=model.head.parameters(), times=min(0.3 * rate, 0.01))], betas=(0.9, 0.99))
        batches = Batches(len(which), size, seed, "fine-tuning order")
        for step in range(steps):
            chosen = which[batches(step).numpy()]
            counts = evaluation.rows(self.counts, chosen).to_dense()          # (B, V + P)
            logits = model(counts, self.context[chosen], self.words[chosen])  # (B, C)
            loss = F.cross_entropy(logits, self.labels[chosen]) + strength / 2 * model.head.weight.square().sum()
            loss.backward()
            take_step([optimizer], rate_at(step, steps, warmup=0, decay=1))
        return model

    @torch.no_grad()
    def answers(self, model, which):
        return model(evaluation.rows(self.counts, which), self.context[which], self.words[which]).argmax(1)


SCRATCH_RATES, TUNED_RATES = (0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 0.003, 0.01, 0.03, 0.1)


def rates_and_epochs(rates, n):
    """What to choose among with n labels: [(rate, epochs), ...]"""
    fewest = int(min(30, max(2, 4000 / n)))
    return [(rate, epochs) for rate in rates
            for epochs in ([fewest] if n > 5000 or rate == 0 else [fewest, 3 * fewest])]


# ---------------------------------------------------------------- images

class ImageTask:
    """data: Images with labels. model: the pretrained one; new_model(seed): the same, untrained. flip: may training
    mirror images? code: an autoencoder's numbers a code, for the column of as many principal components."""

    trials = 1                          # draws of labels on which an option is tried: an image encoder is trained whole
    rows = ["10", "50", "500", "all"]   # of the table

    def __init__(self, data, model, cast, device, precision, new_model, flip, code):
        self.model, self.cast, self.device, self.precision = model.to(device), cast, device, precision
        self.new_model, self.flip, self.code = new_model, flip, code
        self.images, self.labels, self.classes = data.to(device), torch.from_numpy(data.labels), data.classes
        self.train, self.held_out, self.test = (np.flatnonzero(data.split == s) for s in (TRAIN, HELD_OUT, TEST))
        z, self.mean, self.deviation = standardised(self.features(self.model), self.train)
        self.probe = Linear(z.__getitem__, self.labels, len(self.classes))

    def features(self, model):
        return evaluation.image_features(model.eval().encode, self.images, self.cast, self.device, progress)

    def columns(self):
        """{name: Column or Linear}, in the table's order."""
        classes, columns = len(self.classes), {}
        some = self.train[evenly(len(self.train), 10_000)]
        sample = self.images[some].cpu().flatten(1).float()                   # (≤ 10,000, C·H·W)
        mean, deviation = sample.mean(0), sample.std(0, correction=0).clamp(min=1)
        pixels = lambda which: (self.images[which].cpu().flatten(1).float() - mean) / deviation
        columns["pixels"] = Linear(pixels, self.labels, classes, (3, 1, 0.3, 0.1, 0.03))
        if self.code:                                                         # the autoencoder's linear relative
            _, _, directions = torch.linalg.svd(sample - mean, full_matrices=False)
            directions = directions[:min(self.code, len(sample) - 1)].T       # (C·H·W, D); n images span n − 1
            scores = torch.cat([(self.images[part].cpu().flatten(1).float() - mean) @ directions for part in
                                np.array_split(np.arange(len(self.images)), max(1, len(self.images) // 10_000))])
            scores = standardised(scores, self.train)[0]
            columns["pixel PCA"] = Linear(scores.__getitem__, self.labels, classes)
        untrained = self.new_model(0).to(self.device)
        for module in untrained.modules():                                    # its batch norm has seen images, too
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            untrained.train().encode(self.images[some[evenly(len(some), 1000)]].to(self.device).float() / 255)
        untrained = standardised(self.features(untrained), self.train)[0]
        columns["untrained"] = Linear(untrained.__getitem__, self.labels, classes)
        few, many = [(0.005, 0.5), (0.02, 0.5), (0.02, 0.2)], [(0.02, 0.5), (0.02, 0.2), (0.05, 0.2)]
        columns["from scratch"] = Column(self.fit_from_scratch, self.answers, lambda n: few if n <= 5000 else many)
        columns["linear probe"] = self.probe
        columns["fine-tuned"] = Column(self.fit_fine_tuned, self.answers, lambda n: [
            (rate, 0.5) for rate in ((0.0, 0.0005, 0.002) if n <= 5000 else (0.0, 0.005, 0.02, 0.05))])
        return columns

    def fit_from_scratch(self, which, option, seed):
        body, D, C = self.new_model(seed), len(self.mean), len(self.classes)
        classifier = Classifier(body, torch.zeros(D), torch.ones(D), torch.zeros(D + 1, C))
        return self.train_classifier(classifier, which, option, seed, smoothing=0.1, frozen_norm=False)

    def fit_fine_tuned(self, which, option, seed):
        classifier = Classifier(deepcopy(self.model), self.mean, self.deviation, self.probe.fit(which)[0])
        return self.train_classifier(classifier, which, option, seed, smoothing=0.0, frozen_norm=len(which) <= 5000)

    def train_classifier(self, model, which, option, seed, smoothing, frozen_norm, images_seen=9600):
        """Both ways get the same steps: `images_seen`, or 4 epochs where that is more. option: (Muon's rate, least
        share of the image in a crop)."""
        (rate, crop), n = option, len(which)
        model = model.to(self.device, memory_format=torch.channels_last)
        B = min(n, 64 if n <= 5000 else 256)
        steps = max(images_seen, 4 * n) // B if rate else 0
        kernels = [p for p in model.body.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1] + [model.head.weight]
        optimizers = [Muon(kernels, rate, precision=self.precision),
                      torch.optim.Adam([dict(params=vectors, times=0.1)])]
        model.train(not frozen_norm)
        batches = Batches(n, B, seed, "fine-tuning order")
        for step in range(steps):
            chosen = which[batches(step).numpy()]
            numbers = torch.rand(B, 12, generator=generator(seed, "fine-tuning views", step)).to(self.device)
            x = contrastive.augment(self.images[chosen].to(self.device), self.images.shape[2:], numbers, crop,
                                    jitter=0.2, hue=0.05, grey=0.0, flip=self.flip)
            with self.cast:
                logits = model(x)
            loss = F.cross_entropy(logits.float(), self.labels[chosen].to(self.device), label_smoothing=smoothing)
            loss.backward()
            take_step(optimizers, rate * min(1, 10 * (step + 1) / steps) * (1 - step / steps))
            if step % 10 == 0:
                progress(f"training on {n:,} labels, rate {rate}: step {step:,} of {steps:,}")
        return model.eval()

    @torch.no_grad()
    def answers(self, model, which):
        return evaluation.image_features(model, self.images[which], self.cast, self.device).argmax(1)


# ---------------------------------------------------------------- new examples

CLASSIFIER_FORMAT = "minissl classifier 2"


def read_classifier(run, checkpoint, body):
    """classifier.pt of the run's folder -> (Classifier around `body`, names of its classes)."""
    command = f"finetune.py {shlex.quote(str(run))}"
    saved = read_checkpoint(Path(run) / "classifier.pt", CLASSIFIER_FORMAT,
                            f"run {command} without --probe first: it is made with the table")
    if saved["step"] != checkpoint["step"]:
        raise UserError(f"{run} has been trained further since its classifier was made: run {command} again")
    mean, classes = saved["model"]["mean"], saved["classes"]
    classifier = Classifier(body, mean, torch.ones_like(mean), torch.zeros(len(mean) + 1, len(classes)))
    classifier.load_state_dict(saved["model"])
    return classifier, classes


def label_texts(run, path, checkpoint, model, cast, device):
    """Print label, probability and text for each text of a file."""
    if not Path(path).is_file() or Path(path).suffix == ".npy":
        what = "a folder" if Path(path).is_dir() else "an array" if Path(path).is_file() else "there is no such file"
        raise UserError(f"--predict {path}: {what}; give a .txt, a text a line or a paragraph")
    strings = list(read_texts(Path(path)))
    if not strings:
        raise UserError(f"--predict {path}: there is no text in it")
    classifier, classes = read_classifier(run, checkpoint, Embeddings(model.term_table().detach()))
    task = TextTask(texts_of(strings, runs.tokenizer_of(checkpoint)), model, cast, device)
    with torch.no_grad():
        chances = classifier(task.counts, task.context, task.words).softmax(1)
    for text, row in zip(strings, chances):
        print(f"{classes[int(row.argmax())]}\t{float(row.max()):.2f}\t{' '.join(text.split())}")


def label_images(run, path, checkpoint, model, cast, device):
    """Print label, probability and index for each image of a .npy."""
    if Path(path).suffix != ".npy":
        raise UserError(f"--predict {path}: the run learned from images; give a .npy of them")
    images = own_images(Path(path), keep_all=True, flag="--predict")
    runs.check_images(images, model, path)
    for note in images.notes:
        print(f"mind: {note}", file=sys.stderr)
    classifier, classes = read_classifier(run, checkpoint, model)
    chances = evaluation.image_features(classifier.to(device).eval(), images, cast, device).softmax(1)
    for n, row in enumerate(chances):
        print(f"{classes[int(row.argmax())]}\t{float(row.max()):.2f}\t{n}")
