"""The columns of finetune.py's table: what one can do with a few labels.

A task, TextTask or ImageTask, holds the examples and knows which of them are for training, for
choices and for the test. It gives a column for each way to get a classifier from a few labels.
A column learns from the labels of the examples that it is given, and from no others.

How a text encoder is fine-tuned. The document vector is a mean of token vectors. Each token
vector is the token's embedding plus what the blocks add from the context. Fine-tuning moves the
embeddings, because a label mostly says something about words. The part of the blocks is computed
once and stays, so a step is one product with the counts of words and pairs. The model that is
trained from scratch has no part of the blocks, because an untrained block adds zero.

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
from minissl.data.texts import frequent_pairs
from minissl.evaluation import probes
from minissl.evaluation.features import image_features, images_a_batch, text_features
from minissl.evaluation.self_training import SelfTraining
from minissl.optim import Muon, lr_schedule, step_optimizers
from minissl.training.files import progress, read_checkpoint, write_checkpoint
from minissl.training.machine import move_to_device


MANY_LABELS = 5000      # above this number training is cheap for each label, and so it changes


# ---------------------------------------------------------------- columns

@dataclass
class Column:
    """A way to get a classifier from a few labels."""
    options: Callable       # n labels -> options, of which one is chosen on held-out examples
    fit: Callable           # (indices, option, seed) -> a model, from these examples' labels
    predict: Callable       # (model, indices) -> the classes of these examples, (n,) int64


PROBE_STRENGTHS = (3, 1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
PIXEL_STRENGTHS = (3, 1, 0.3, 0.1, 0.03)
TF_IDF_STRENGTHS = (1e-2, 1e-3, 1e-4, 3e-5, 1e-5)


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
SCRATCH_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
FINE_TUNING_RATES = (0.0, 0.003, 0.01, 0.03, 0.1)


class Embeddings(nn.Module):
    """The text encoder as far as fine-tuning moves it: a table with a row a word or pair.

    Arguments: table (V + P, d), where it starts; context_weight, of what the blocks add to the
    document vector: 1, or 0 for a model without blocks.
    """

    def __init__(self, table, context_weight=1):
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.context_weight = context_weight

    def encode(self, counts, words, context):
        """Features (B, d), from counts (B, V + P), words (B, 1) and context (B, d)."""
        return transformer.norm(counts @ self.table / words + self.context_weight * context)


class Documents:
    """What a pretrained encoder makes of N texts.

        features (N, d)         the document vectors
        counts (N, V + P)       SparseRows: how often each word and pair occurs
        words (N, 1)            how many words each text has
        context (N, d)          what the blocks add: features − counts · table / words
    """

    def __init__(self, texts, model, autocast, device):
        model.to(device)
        self.features = text_features(model, texts, autocast, device, progress)
        model.cpu()
        self.counts = probes.term_counts(texts, model.pairs.numpy())
        self.words = torch.from_numpy(texts.lengths).float()[:, None]
        self.table = model.term_table().detach()                          # (V + P, d)
        self.context = self.features - self.counts @ self.table / self.words

    def inputs(self, indices):
        """counts, words and context of these texts, for Embeddings.encode."""
        return self.counts[indices], self.words[indices], self.context[indices]


class TextTask:
    """Classification of texts.

    Arguments: texts, Texts with labels; model, the pretrained TextEncoder; autocast and device,
    for its forward pass.
    """

    default_labels = TEXT_LABELS
    choice_draws = 3            # an option is tried on this many draws of labels

    def __init__(self, texts, model, autocast, device):
        self.texts = texts
        self.classes = texts.classes
        self.labels = torch.from_numpy(texts.labels)
        self.train = np.flatnonzero(texts.split == TRAIN)
        self.held_out = np.flatnonzero(texts.split == HELD_OUT)
        self.test = np.flatnonzero(texts.split == TEST)
        self.documents = Documents(texts, model, autocast, device)
        features = self.documents.features
        self.z, self.mean, self.std = standardize(transformer.norm(features), self.train)
        self.probe = LinearColumn(self.z, self.labels, len(self.classes))
        self.spread = float(features[self.train].std(0, correction=0).mean())

    def columns(self):
        """{name: column}, in the order of the table."""
        tf_idf = LinearColumn(self.tf_idf(), self.labels, len(self.classes), TF_IDF_STRENGTHS)
        scratch = Column(self.scratch_options, self.fit_from_scratch, self.predict)
        fine_tuned = Column(self.fine_tuning_options, self.fit_fine_tuned, self.predict)
        return {
            "tf-idf": tf_idf,
            "from scratch": scratch,
            "linear probe": self.probe,
            "fine-tuned": fine_tuned,
        }

    def tf_idf(self):
        """tf-idf of words and of up to 200,000 pairs, without the test texts' frequencies."""
        not_test = np.concatenate([self.train, self.held_out])
        pairs = frequent_pairs(self.texts.select(not_test), 200_000, least=1)
        return probes.tf_idf(probes.term_counts(self.texts, np.asarray(pairs)), not_test)

    def scratch_options(self, n):
        return rates_and_epochs(SCRATCH_RATES, n)

    def fine_tuning_options(self, n):
        return rates_and_epochs(FINE_TUNING_RATES, n)

    def fit_from_scratch(self, indices, option, seed):
        """A Classifier of random embeddings, trained on these texts; option: (rate, epochs)."""
        rate, epochs = option
        d, C = len(self.mean), len(self.classes)
        normal = torch.randn(self.documents.table.shape,
                             generator=generator(seed, "from scratch", 0))
        body = Embeddings(0.1 * normal, context_weight=0)
        classifier = Classifier(body, torch.zeros(d), torch.ones(d), torch.zeros(d + 1, C))
        return self.train_classifier(classifier, indices, rate * 0.1, rate, epochs, 0, seed)

    def fit_fine_tuned(self, indices, option, seed):
        """A Classifier that starts as the linear probe; option: (rate, epochs)."""
        rate, epochs = option
        weights, strength = self.probe.fit(indices)
        classifier = Classifier(Embeddings(self.documents.table), self.mean, self.std, weights)
        return self.train_classifier(classifier, indices, rate * self.spread, rate, epochs,
                                     strength, seed)

    def train_classifier(self, model, indices, table_rate, rate, epochs, strength, seed):
        """Train the whole Classifier on the texts `indices`, by Adam. The rate falls to 0.

        table_rate is for the embeddings. It is `rate` times the spread of what they move: from
        scratch their own, in fine-tuning that of the document vectors, which can be a thousand
        times larger (EXPERIMENTS.md, "In which unit should the learning rate of the embeddings
        be measured?"). strength: the L2 penalty of the linear layer, as in the probe.
        """
        size = min(64, len(indices))
        steps = max(1, epochs * len(indices) // size)
        if rate == 0:
            steps = 0
        groups = [
            dict(params=model.body.parameters(), lr_scale=table_rate),
            dict(params=model.head.parameters(), lr_scale=min(0.3 * rate, 0.01)),
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        batches = Batches(len(indices), size, seed, "fine-tuning order")
        for step in range(steps):
            batch = indices[batches(step).numpy()]
            counts, words, context = self.documents.inputs(batch)
            logits = model(counts.to_dense(), words, context)             # (B, C)
            penalty = strength / 2 * model.head.weight.square().sum()
            loss = F.cross_entropy(logits, self.labels[batch]) + penalty
            loss.backward()
            step_optimizers([optimizer], lr_schedule(step, steps, warmup=0, decay=1))
        return model

    @torch.no_grad()
    def predict(self, model, indices):
        return model(*self.documents.inputs(indices)).argmax(1)


def rates_and_epochs(rates, n):
    """The options with n labels: [(rate, epochs), ...]. At rate 0 nothing moves.

    >>> rates_and_epochs((0.0, 0.1), 1000)
    [(0.0, 4), (0.1, 4), (0.1, 12)]
    """
    fewest = int(min(30, max(2, 4000 / n)))
    options = []
    for rate in rates:
        options.append((rate, fewest))
        if rate > 0 and n <= MANY_LABELS:
            options.append((rate, 3 * fewest))
    return options


# ---------------------------------------------------------------- images

MOST_UNLABELLED = 50_000        # images of which self-training guesses the classes
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

CLASSIFIER_FORMAT = "minissl classifier 4"
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
