"""The columns of finetune.py's table: what one can do with a few labels.

A task, TextTask or ImageTask, holds the examples and knows which of them are for training, for
choices and for the test. It gives a column for each way to get a classifier from a few labels.
A column learns from the labels of the examples that it is given, and from no others.

How a text encoder is fine-tuned: as a whole. The vector of a text is the mean of the vectors of its
windows: of at most eight in a training step, so that long texts fit into memory, and of all in
the test.

How an image encoder is fine-tuned: as a whole. With few labels its batch norm keeps the means
and variances of the pretraining, because a few images cannot estimate them well.

Read next: ../../finetune.py.
"""

import shlex
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minissl import UserError, contrastive, transformer
from minissl.data.batches import Batches, generator
from minissl.data.splits import HELD_OUT, TEST, TRAIN, evenly_spaced
from minissl.data.texts import SAMPLE_TEXTS
from minissl.evaluation import ngrams, probes
from minissl.evaluation.co_training import CoTraining, in_units
from minissl.evaluation.features import (
    document_vectors,
    image_features,
    images_a_batch,
    no_progress,
    text_features,
)
from minissl.evaluation.ngrams import NGramColumn
from minissl.evaluation.self_training import SelfTraining
from minissl.optim import Muon, lr_schedule, step_optimizers
from minissl.training.files import progress, read_checkpoint, write_checkpoint
from minissl.training.machine import move_to_device


MOST_UNLABELLED = 50_000        # examples of which self-training guesses the classes
MANY_LABELS = 5000      # with more labels, other settings are tried


# ---------------------------------------------------------------- columns

@dataclass
class Column:
    """A way to get a classifier from a few labels."""
    options: Callable       # n labels -> options, of which one is chosen on held-out examples
    fit: Callable           # (indices, option, seed) -> a model, from these examples' labels
    predict: Callable       # (model, indices) -> the classes of these examples, (n,) int64


def no_options(n):
    """The options of a column that has nothing to choose."""
    return [None]


PROBE_STRENGTHS = (3, 1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
PIXEL_STRENGTHS = (3, 1, 0.3, 0.1, 0.03)


class LinearColumn:
    """The column of a logistic regression, whose strength is chosen among the labels it is given.

    Arguments: x, the features of all N examples: x[indices] is (n, D), dense or SparseRows;
    labels (N,) int64; classes, their number; strengths, to choose from.
    """

    def __init__(self, x, labels, classes, strengths=PROBE_STRENGTHS):
        self.x = x
        self.labels = labels
        self.classes = classes
        self.strengths = strengths
        self.fitted = {}                # the fine-tuned column asks for the probe's solution again

    def options(self, n):
        return [None]

    def fit(self, indices, option=None, seed=None):
        """(weights (D + 1, C), strength). There is nothing random in it."""
        key = np.asarray(indices).tobytes()
        if key not in self.fitted:
            self.fitted[key] = probes.probe(
                self.x[indices], self.labels[indices], self.classes, self.strengths)
        return self.fitted[key]

    def predict(self, model, indices):
        weights, _ = model
        predictions = []
        for part in np.array_split(indices, parts_of(len(indices), len(weights))):
            logits = probes.predict(self.x[part], weights)
            predictions.append(logits.argmax(1))
        return torch.cat(predictions)


def parts_of(n, columns):
    """Into how many parts to cut n rows: each has about 10,000, fewer if it has many columns."""
    rows = min(10_000, max(1, 2**25 // columns))        # at most 128 MB of float32
    return max(1, n // rows)


def standardize(x, pool):
    """x (N, D) with mean 0 and std 1 over the rows `pool`; and that mean (D,) and std (D,)."""
    mean = x[pool].mean(0)
    std = x[pool].std(0, correction=0).clamp(min=1e-6)
    return (x - mean) / std, mean, std


class Classifier(nn.Module):
    """An encoder with a linear layer on its standardized features.

    Arguments: body, with body.encode(...) -> (B, D); mean and std (D,) of the features of the
    training examples; weights (D + 1, C), as of a probe, where the linear layer starts.
    """

    def __init__(self, body, mean, std, weights):
        super().__init__()
        self.body = body
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        D, C = weights[:-1].shape
        self.head = nn.Linear(D, C)
        self.head.load_state_dict(dict(weight=weights[:-1].T, bias=weights[-1]))

    def forward(self, *inputs):
        """Logits (B, C) float32."""
        z = (self.body.encode(*inputs).float() - self.mean) / self.std
        # In bfloat16 two classes often get the same logit, and argmax takes the first of them.
        if z.device.type == "mps":          # computes in float32; torch 2.4 has no autocast there
            return self.head(z)
        with torch.autocast(z.device.type, enabled=False):
            return self.head(z)


# ---------------------------------------------------------------- texts

TEXT_LABELS = ["10", "100", "500", "all"]       # a class, the rows of the table


def texts_a_batch(lengths):
    """How many texts of these lengths (N,) make a batch of about 4,096 tokens: from 16 to 64.

    >>> texts_a_batch(np.array([200, 300])), texts_a_batch(np.array([10]))
    (16, 64)
    """
    return int(np.clip(4096 / lengths.mean(), 16, 64))


class WholeTextEncoder(nn.Module):
    """A TextEncoder as the body of a Classifier: it reads whole texts.

    Arguments: encoder; autocast and device, for its forward pass.
    """

    def __init__(self, encoder, autocast, device):
        super().__init__()
        self.encoder = move_to_device(encoder, device)
        self.autocast = autocast
        self.device = device

    def encode(self, texts, draws=None):
        """Features (N, d) of Texts, on the CPU. draws: as in `features.windows_of`."""
        is_training = draws is not None
        shown = no_progress if is_training else progress
        vectors = document_vectors(
            self.encoder, texts, self.autocast, self.device, shown, draws)
        return transformer.norm(vectors)


class TextTask:
    """Classification of texts.

    Arguments: texts, Texts with labels; model, the pretrained TextEncoder; autocast, device and
    precision, for its training; new_model(seed), which makes the same model untrained;
    unlabelled, Texts of the training split without a label, which share the tokens of `texts`,
    for the columns that learn from guesses, or None.
    """

    default_labels = TEXT_LABELS
    choice_draws = 2            # an option is tried on this many draws of labels

    def __init__(self, texts, model, autocast, device, precision, new_model, unlabelled=None):
        self.model = move_to_device(model, device)
        self.autocast = autocast
        self.device = device
        self.precision = precision
        self.new_model = new_model
        self.unlabelled = texts.select([]) if unlabelled is None else unlabelled
        self.texts = texts
        self.classes = texts.classes
        self.labels = torch.from_numpy(texts.labels)
        self.train = np.flatnonzero(texts.split == TRAIN)
        self.held_out = np.flatnonzero(texts.split == HELD_OUT)
        self.test = np.flatnonzero(texts.split == TEST)
        z, self.mean, self.std = standardize(self.features(texts), self.train)
        self.probe = LinearColumn(z, self.labels, len(self.classes))
        self.last_logits = None, None   # a classifier, and what it said about the texts, (N, C)
        self.fine_tuned = None          # the labelled texts of the last fine-tuning, and its result
        self.co_training = None         # the column "self-trained", made by `columns`

    def features(self, texts):
        """The features of Texts by the pretrained model, (N, d), not standardized."""
        vectors = text_features(self.model, texts, self.autocast, self.device, progress)
        return transformer.norm(vectors)

    def columns(self):
        """{name: column}, in the order of the table. The last needs what "fine-tuned" fits."""
        most = max(0, MOST_UNLABELLED - len(self.train))
        extra = self.unlabelled.sample(most)
        n_grams = self.ngram_column(extra)
        self.co_training = self.co_training_column(n_grams, extra)
        return {
            "n-grams": n_grams,
            "from scratch": Column(self.scratch_options, self.fit_from_scratch, self.predict),
            "linear probe": self.probe,
            "self-trained": self.co_training,
            "fine-tuned": Column(self.fine_tuning_options, self.fit_fine_tuned, self.predict),
            "fine-tuned + n-grams": Column(no_options, self.fit_joined, self.predict_joined),
        }

    def ngram_column(self, extra):
        """The column "n-grams". It also counts the n-grams of the Texts `extra`, for co-training.

        The test texts neither choose n-grams nor weigh them.
        """
        not_test = np.concatenate([self.train, self.held_out])
        counted = self.texts.select(not_test).sample(SAMPLE_TEXTS)
        C, V = len(self.classes), len(self.texts.tokenizer)
        longest = ngrams.LONGEST if C <= ngrams.MOST_CLASSES else 2     # tf-idf takes pairs alone
        most = min(ngrams.MOST_NGRAMS, ngrams.MOST_WEIGHTS // C)
        progress("counting n-grams")
        keys = ngrams.frequent_ngrams(counted, longest, most)           # sorted: triples are last
        counts = ngrams.count_ngrams(self.texts.followed_by(extra), keys, longest)
        return NGramColumn(counts, (keys < V**2).sum(), self.labels, C, not_test)

    def co_training_column(self, n_grams, extra):
        """The column of a student of n-grams that learns from up to 50,000 texts without labels."""
        x = torch.zeros(0, len(self.mean))
        if len(extra):
            x = (self.features(extra) - self.mean) / self.std
        pool = self.train[evenly_spaced(len(self.train), MOST_UNLABELLED)]
        return CoTraining(self.probe, n_grams, pool, self.held_out, x)

    # EXPERIMENTS.md: "What does a transformer from scratch need?" and "Does it help to fine-tune
    # the whole transformer?".

    def scratch_options(self, n):
        """(rate of Muon, steps)"""
        if n <= MANY_LABELS:
            return [(0.02, 100), (0.02, 300)]
        return [(0.02, self.steps(n, epochs=4))]

    def fine_tuning_options(self, n):
        """(rate of Muon, steps). At rate 0 this is the probe."""
        if n <= MANY_LABELS:
            return [(0.0, 0), (0.003, 150), (0.01, 150)]
        return [(0.01, self.steps(n, epochs=2))]

    def steps(self, n, epochs):
        """The steps of so many epochs of n texts, but at least 500."""
        size = texts_a_batch(self.texts.lengths[self.train])
        return max(500, epochs * n // size)

    def fit_from_scratch(self, indices, option, seed):
        """A Classifier around an untrained encoder, trained on these texts.

        Its features are standardized over up to 1,000 of them, because those of an untrained
        encoder are nearly the same for all texts (EXPERIMENTS.md, "What does a transformer from
        scratch need?").
        """
        d, C = len(self.mean), len(self.classes)
        body = WholeTextEncoder(self.new_model(seed), self.autocast, self.device)
        sample = indices[evenly_spaced(len(indices), 1000)]
        with torch.no_grad():
            features = body.encode(self.texts.select(sample))
        _, mean, std = standardize(features, np.arange(len(sample)))
        classifier = Classifier(body, mean, std, torch.zeros(d + 1, C))
        return self.train_classifier(
            classifier, indices, option, seed, strength=0, embedding_scale=0.15)

    def fit_fine_tuned(self, indices, option, seed):
        """A Classifier around the pretrained encoder that starts as the linear probe."""
        weights, strength = self.probe.fit(indices)
        body = WholeTextEncoder(deepcopy(self.model), self.autocast, self.device)
        classifier = Classifier(body, self.mean, self.std, weights)
        self.train_classifier(
            classifier, indices, option, seed, strength, embedding_scale=0.3)
        rate, _ = option
        if rate == 0:       # then it says what the probe says, and need not read any text again
            self.last_logits = classifier, probes.predict(self.probe.x, weights)
        self.fine_tuned = np.array(indices), classifier
        return classifier

    def fit_joined(self, indices, option, seed):
        """(the fine-tuned Classifier, the student of co-training).

        Must follow `fit_fine_tuned` on the same labels, because it takes the result of that.
        """
        fitted_on, classifier = self.fine_tuned
        if not np.array_equal(fitted_on, indices):
            raise ValueError("the encoder was fine-tuned on other texts")
        _, student = self.co_training.fit(indices)
        return classifier, student

    def train_classifier(self, model, indices, option, seed, strength, embedding_scale):
        """Train the whole Classifier on the texts `indices`.

        option: see `fine_tuning_options`; strength: the L2 penalty of the linear layer, as in
        the probe; embedding_scale: the embeddings and the linear layer learn at this share of
        the rate of the blocks.
        """
        rate, steps = option
        n = len(indices)
        size = min(n, texts_a_batch(self.texts.lengths[indices]))
        optimizers = self.optimizers(model, rate, embedding_scale)
        batches = Batches(n, size, seed, "fine-tuning order")
        model.train()
        for step in range(steps):
            batch = indices[batches(step).numpy()]
            draws = torch.rand(size, generator=generator(seed, "fine-tuning windows", step))
            logits = model(self.texts.select(batch), draws)               # (B, C)
            penalty = strength / 2 * model.head.weight.square().sum()
            loss = F.cross_entropy(logits, self.labels[batch]) + penalty
            loss.backward()
            step_optimizers(optimizers, rate * lr_schedule(step, steps, 0.1 * steps, decay=1))
            if step % 10 == 0:
                progress(f"training on {n:,} labels, rate {rate}: step {step:,} of {steps:,}")
        return model.eval()

    def optimizers(self, model, rate, embedding_scale):
        """Muon for the blocks; Adam for the embeddings and the linear layer."""
        encoder = model.body.encoder
        parameters = [
            encoder.token_embedding.weight,
            encoder.pair_embedding.weight,
            *model.head.parameters(),
        ]
        groups = [dict(params=parameters, lr_scale=embedding_scale)]
        fused = self.device.type != "mps"
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=fused)
        blocks = list(encoder.blocks.parameters())
        if not blocks:
            return [adam]
        return [Muon(blocks, rate, precision=self.precision), adam]

    @torch.no_grad()
    def logits(self, classifier, indices):
        """What a Classifier says about these texts, (n, C).

        The answers of the last classifier are kept, because two columns ask for them.
        """
        last, known = self.last_logits                          # known: (N, C), nan where unknown
        if last is not classifier:
            known = torch.full((len(self.texts), len(self.classes)), float("nan"))
            self.last_logits = classifier, known
        unknown = indices[known[indices].isnan().any(1).numpy()]
        if len(unknown):
            known[unknown] = classifier(self.texts.select(unknown))
        return known[indices]

    def predict(self, model, indices):
        return self.logits(model, indices).argmax(1)

    def predict_joined(self, model, indices):
        """The sum of what both say, each in its standard deviation over the held-out texts."""
        classifier, student = model
        own = in_units(self.logits(classifier, indices), self.logits(classifier, self.held_out))
        return (own + self.co_training.student_logits(student, indices)).argmax(1)


# ---------------------------------------------------------------- images

IMAGE_LABELS = ["10", "50", "500", "all"]       # a class, the rows of the table


class Pixels:
    """Images as rows of standardized pixels: x[indices] is (n, C·H·W) float32."""

    def __init__(self, images, mean, std):
        self.images = images
        self.mean = mean
        self.std = std

    def __getitem__(self, indices):
        return (flat_pixels(self.images, indices) - self.mean) / self.std


def flat_pixels(images, indices):
    """The pixels of these images, (n, C·H·W) float32 from 0 to 255, on the CPU."""
    return images[indices].cpu().flatten(1).float()


class ImageTask:
    """Classification of images.

    Arguments: data, Images with labels; model, the pretrained one, with `encode`; autocast,
    device and precision, for its training; new_model(seed), which makes the same model
    untrained; flip, whether training may mirror images, and features are averaged over the
    mirror image; code, the numbers in an autoencoder's code, or None: with it there is a column
    of as many principal components; unlabelled, Images of the training split without a label,
    for the column "self-trained", or None.
    """

    default_labels = IMAGE_LABELS
    choice_draws = 1            # one draw of labels, because a whole encoder is trained on it

    def __init__(self, data, model, autocast, device, precision, new_model, flip, code,
                 unlabelled=None):
        self.model = move_to_device(model, device)
        self.autocast = autocast
        self.device = device
        self.precision = precision
        self.new_model = new_model
        self.flip = flip
        self.code = code
        self.images = data.to(device)
        self.classes = data.classes
        self.labels = torch.from_numpy(data.labels)
        self.train = np.flatnonzero(data.split == TRAIN)
        self.held_out = np.flatnonzero(data.split == HELD_OUT)
        self.test = np.flatnonzero(data.split == TEST)
        self.unlabelled = unlabelled
        z, self.mean, self.std = standardize(self.features(self.model), self.train)
        self.probe = LinearColumn(z, self.labels, len(self.classes))

    def features(self, model, images=None):
        """The features by this model, (N, D), of all images of the table, or of other ones."""
        encode = model.eval().encode
        images = self.images if images is None else images
        return image_features(encode, images, self.autocast, self.device, progress,
                              mirror=self.flip)

    def columns(self):
        """{name: column}, in the order of the table."""
        C = len(self.classes)
        values = self.images[:1].numel()
        most = min(10_000, max(100, 2**25 // values))           # at most 128 MB, or 100 images
        sample = self.train[evenly_spaced(len(self.train), most)]
        pixels = flat_pixels(self.images, sample)
        mean = pixels.mean(0)
        std = pixels.std(0, correction=0).clamp(min=1)

        columns = {}
        columns["pixels"] = LinearColumn(
            Pixels(self.images, mean, std), self.labels, C, PIXEL_STRENGTHS)
        if self.code:
            components = self.principal_components(pixels, mean)
            columns["pixel PCA"] = LinearColumn(components, self.labels, C)
        untrained = self.untrained_features(sample)
        columns["untrained"] = LinearColumn(untrained, self.labels, C)
        columns["from scratch"] = Column(
            self.scratch_options, self.fit_from_scratch, self.predict)
        columns["linear probe"] = self.probe
        columns["self-trained"] = self.self_training()
        columns["fine-tuned"] = Column(
            self.fine_tuning_options, self.fit_fine_tuned, self.predict)
        return columns

    def self_training(self):
        """The column of a probe that also learns from up to 50,000 images without their labels."""
        extra = torch.zeros(0, len(self.mean))
        if self.unlabelled is not None and len(self.unlabelled):
            most = max(0, MOST_UNLABELLED - len(self.train))
            sample = evenly_spaced(len(self.unlabelled), most)
            features = self.features(self.model, self.unlabelled.select(sample))
            extra = (features - self.mean) / self.std
        pool = self.train[evenly_spaced(len(self.train), MOST_UNLABELLED)]
        return SelfTraining(self.probe, pool, extra)

    def principal_components(self, pixels, mean):
        """The linear relative of an autoencoder's code: standardized scores (N, D).

        The directions are those of a sample of the training images, pixels (n, C·H·W). There are
        as many as a code has numbers, but n images span only n − 1 directions.
        """
        _, _, directions = torch.linalg.svd(pixels - mean, full_matrices=False)
        D = min(self.code, len(pixels) - 1)
        directions = directions[:D].T                                     # (C·H·W, D)
        scores = []
        N = len(self.images)
        for part in np.array_split(np.arange(N), parts_of(N, pixels.shape[1])):
            scores.append((flat_pixels(self.images, part) - mean) @ directions)
        standardized, _, _ = standardize(torch.cat(scores), self.train)
        return standardized

    @torch.no_grad()
    def untrained_features(self, sample):
        """Standardized features (N, D) of the model with random weights.

        Its batch norm takes its statistics from up to 1,000 training images, because that of the
        pretrained model has seen images as well. With momentum None it averages over batches.
        """
        model = move_to_device(self.new_model(0), self.device)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = None
        model.train()
        seen = sample[evenly_spaced(len(sample), 1000)]
        size = max(2, images_a_batch(self.images.shape[1:], 1000))       # for batch norm
        for part in np.array_split(seen, -(-len(seen) // size)):          # of nearly equal sizes
            x = self.images[part].to(self.device).float() / 255
            model.encode(x)
        standardized, _, _ = standardize(self.features(model), self.train)
        return standardized

    def scratch_options(self, n):
        """(rate of Muon, smallest share of the image in a crop)"""
        if n <= MANY_LABELS:
            return [(0.005, 0.5), (0.02, 0.5), (0.02, 0.2)]
        return [(0.02, 0.5), (0.02, 0.2), (0.05, 0.2)]

    def fine_tuning_options(self, n):
        """(rate of Muon, smallest share of the image in a crop)"""
        if n <= MANY_LABELS:
            return [(0.0, 0.5), (0.0005, 0.5), (0.002, 0.5)]
        return [(0.0, 0.5), (0.005, 0.5), (0.02, 0.5), (0.05, 0.5)]

    def fit_from_scratch(self, indices, option, seed):
        """A Classifier around an untrained model, trained on these images.

        Its features are divided by their root mean square, because the linear layer learns
        slowly from small features (EXPERIMENTS.md, "Which scale of the features suits training
        from scratch?").
        """
        D, C = len(self.mean), len(self.classes)
        body = move_to_device(self.new_model(seed), self.device)
        size = max(2, images_a_batch(self.images.shape[1:], 250))         # for batch norm
        first = np.resize(indices, max(2, min(size, len(indices))))       # one image, twice
        x = self.images[first].to(self.device).float() / 255
        with torch.no_grad(), self.autocast:
            features = deepcopy(body).train().encode(x).float()           # (n, D)
        scale = features.square().mean().sqrt().clamp(min=1e-6).cpu().expand(D)
        classifier = Classifier(body, torch.zeros(D), scale, torch.zeros(D + 1, C))
        return self.train_classifier(classifier, indices, option, seed,
                                     smoothing=0.1, freeze_norm=False)

    def fit_fine_tuned(self, indices, option, seed):
        """A Classifier around the pretrained model that starts as the linear probe."""
        weights, _ = self.probe.fit(indices)
        classifier = Classifier(deepcopy(self.model), self.mean, self.std, weights)
        return self.train_classifier(classifier, indices, option, seed,
                                     smoothing=0.0, freeze_norm=len(indices) <= MANY_LABELS)

    def train_classifier(self, model, indices, option, seed, smoothing, freeze_norm,
                         images_seen=9600):
        """Train the whole Classifier on the images `indices`.

        From scratch and fine-tuned get the same number of steps: `images_seen` images, or 4
        epochs if that is more. option: see `fine_tuning_options`; smoothing, of the labels;
        freeze_norm: keep the statistics of batch norm.
        """
        rate, crop = option
        n = len(indices)
        size = min(n, 64 if n <= MANY_LABELS else 256)
        size = max(2, images_a_batch(self.images.shape[1:], size))        # for batch norm
        steps = max(images_seen, 4 * n) // size
        if rate == 0:
            steps = 0
        model = move_to_device(model, self.device)
        model.train(not freeze_norm)
        optimizers = self.optimizers(model, rate)
        batches = Batches(n, size, seed, "fine-tuning order")
        for step in range(steps):
            batch = indices[batches(step).numpy()]
            numbers = torch.rand(size, 12, generator=generator(seed, "fine-tuning views", step))
            x = contrastive.augment(
                self.images[batch].to(self.device), self.images.shape[2:],
                numbers.to(self.device), crop, jitter=0.2, hue=0.05, grey=0.0, flip=self.flip)
            labels = self.labels[batch].to(self.device)
            with self.autocast:
                logits = model(x)                                         # (B, C)
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            loss.backward()
            warmup = min(1, 10 * (step + 1) / steps)
            step_optimizers(optimizers, rate * warmup * (1 - step / steps))
            if step % 10 == 0:
                progress(f"training on {n:,} labels, rate {rate}: step {step:,} of {steps:,}")
        return model.eval()

    def optimizers(self, model, rate):
        """Muon for the encoder's matrices and kernels; Adam for vectors and the linear layer."""
        kernels = [p for p in model.body.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
        vectors.append(model.head.weight)
        return [
            Muon(kernels, rate, precision=self.precision),
            torch.optim.Adam([dict(params=vectors, lr_scale=0.1)]),
        ]

    @torch.no_grad()
    def predict(self, model, indices):
        images = self.images.select(indices)
        logits = image_features(model, images, self.autocast, self.device, mirror=self.flip)
        return logits.argmax(1)


# ---------------------------------------------------------------- classifier.pt

CLASSIFIER_FORMAT = "minissl classifier 5"
CONDITIONS = ("step", "classes", "shape", "flip", "data", "limit", "labels")


def write_classifier(run, model, conditions):
    """Write a Classifier into classifier.pt of the run's folder, with the conditions of its use.

    conditions: a dict of
        step        of the pretraining
        classes     their names
        shape       (C, H, W) of the images, or None for texts
        flip        whether images may be mirrored, or None for texts
        data        what it was trained on, by name or path
        limit       the --limit of that training
        labels      how many labelled examples it was trained on
        checksum    of that data and its labels
    """
    state = dict(format=CLASSIFIER_FORMAT, model=model.state_dict(), **conditions)
    write_checkpoint(Path(run) / "classifier.pt", state)


def read_classifier(run):
    """classifier.pt of a run's folder, as the dict that `write_classifier` wrote.

    Raises UserError if there is none, or something else.
    """
    path = Path(run) / "classifier.pt"
    remedy = f"run: {command_for(run)}"
    saved = read_checkpoint(path, CLASSIFIER_FORMAT, remedy)
    for name in ("model", *CONDITIONS):
        if name not in saved:
            raise UserError(f"{path} is damaged, it has no {name}: delete it, and {remedy}")
    return saved


def build_classifier(saved, body, step, run):
    """The Classifier of a dict of `read_classifier`, around an encoder of its kind.

    step: of the run's checkpoint. Raises UserError if the run has been trained further since,
    or if the classifier is of another encoder or of other classes.
    """
    if saved["step"] != step:
        raise UserError(f"{run} has been trained further since its classifier was made; "
                        f"run: {command_for(run)}")
    try:
        mean = saved["model"]["mean"]
        weights = torch.zeros(len(mean) + 1, len(saved["classes"]))
        classifier = Classifier(body, mean, torch.ones_like(mean), weights)
        classifier.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f"the classifier.pt of {run} does not fit the run; delete it, and "
                        f"run: {command_for(run)}") from None
    return classifier.eval()


def command_for(run):
    """The command that makes a classifier, for messages."""
    return f"python finetune.py {shlex.quote(str(run))}"
