"""The columns of finetune.py's table for images.

Fine-tuning trains the whole image encoder. With few labels its batch norm keeps the means and
variances of the pretraining, because a few images cannot estimate them well.
"""

from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minissl import contrastive
from minissl.data.batches import Batches, generator
from minissl.data.splits import evenly_spaced
from minissl.evaluation.classifier import Classifier
from minissl.evaluation.columns import (
    MANY_LABELS,
    PROBE_STRENGTHS,
    Column,
    LinearLearner,
    Task,
    parts_of,
    plain_column,
    rows_at_once,
    standardize,
)
from minissl.evaluation.features import image_features, images_a_batch
from minissl.evaluation.self_training import SelfTraining
from minissl.optim import lr_schedule, muon_and_adam, step_optimizers
from minissl.training.files import progress
from minissl.training.machine import move_to_device


IMAGE_LABELS = ["10", "50", "500", "all"]       # a class, the rows of the table
PIXEL_STRENGTHS = (3, 1, 0.3, 0.1, 0.03)        # of the column "pixels"


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


class ImageOption(NamedTuple):
    """How a Classifier of images is trained."""
    rate: float             # the peak learning rate of Muon
    crop: float             # the smallest share of the image in a crop
    batch_size: int = 64
    freeze_norm: bool = False   # whether batch norm keeps its means and variances

    def __str__(self):
        if self.rate == 0:
            return "rate 0, so it stays the linear probe"
        return f"rate {self.rate:g}, crops from {self.crop:g} of the image"


class ImageTask(Task):
    """Classification of images.

    Arguments: data, Images; model, the pretrained one, with `encode`; machine, what
    choose_machine returns; new_model(seed), which makes the same model untrained; flip, whether
    training may mirror images, and features are averaged over the mirror image; code, the
    numbers in an autoencoder's code, or None: with it there is a column of as many principal
    components.
    """

    default_labels = IMAGE_LABELS
    choice_draws = 1            # one draw of labels, because each option takes long

    def __init__(self, data, model, machine, new_model, flip, code):
        super().__init__(data)
        self.device, self.precision, self.autocast = machine
        self.model = move_to_device(model, self.device)
        self.new_model = new_model
        self.flip = flip
        self.code = code
        self.images = data.to(self.device)
        self.make_probe(self.features(self.model))
        self.self_training = SelfTraining(self.probe, self.pool)

    def features(self, model):
        """The features of all images by this model, (N, D), not standardized."""
        encode = model.eval().encode
        return image_features(encode, self.images, self.autocast, self.device, progress,
                              mirror=self.flip)

    def columns(self):
        """{name: column}, in the order of the table."""
        C = len(self.classes)
        values = self.images[:1].numel()
        # As many training images as fit into memory: for the mean and deviation of the pixels,
        # the principal components, and the batch norm of "untrained".
        most = max(100, rows_at_once(values))
        sample = self.train[evenly_spaced(len(self.train), most)]
        pixels = flat_pixels(self.images, sample)
        mean = pixels.mean(0)
        # Of 255. A pixel that is nearly constant is not magnified.
        std = pixels.std(0, correction=0).clamp(min=1)

        def linear_column(x, strengths=PROBE_STRENGTHS):
            return plain_column(LinearLearner(x, self.labels, C, strengths))

        columns = {}
        columns["pixels"] = linear_column(Pixels(self.images, mean, std), PIXEL_STRENGTHS)
        if self.code:
            columns["pixel PCA"] = linear_column(self.principal_components(pixels, mean))
        columns["untrained"] = linear_column(self.untrained_features(sample))
        columns["from scratch"] = Column(
            self.fit_from_scratch, self.predict, options=self.scratch_options)
        columns["linear probe"] = plain_column(self.probe)
        columns["self-trained"] = Column(
            self.fit_self_trained,
            self.self_training.predict,
            needs=("linear probe",),
            is_random=False,
        )
        columns["fine-tuned"] = Column(
            self.fit_fine_tuned,
            self.predict,
            needs=("linear probe",),
            options=self.fine_tuning_options,
            prefers_first=True,
        )
        return columns

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
        # Parts of nearly equal sizes. With at least 3, none is a single image, which batch norm
        # cannot take.
        size = max(3, images_a_batch(self.images.shape[1:], 1000))
        for part in np.array_split(seen, -(-len(seen) // size)):
            x = self.images[part].to(self.device).float() / 255
            model.encode(x)
        standardized, _, _ = standardize(self.features(model), self.train)
        return standardized

    def scratch_options(self, n):
        if n <= MANY_LABELS:
            return [ImageOption(0.005, 0.5), ImageOption(0.02, 0.5), ImageOption(0.02, 0.2)]
        return [
            ImageOption(0.02, 0.5, batch_size=256),
            ImageOption(0.02, 0.2, batch_size=256),
            ImageOption(0.05, 0.2, batch_size=256),
        ]

    def fine_tuning_options(self, n):
        """The first is the probe, because with the rate 0 nothing is learned."""
        if n <= MANY_LABELS:
            rates = 0.0, 0.0005, 0.002
            return [ImageOption(rate, 0.5, freeze_norm=True) for rate in rates]
        rates = 0.0, 0.005, 0.02, 0.05
        return [ImageOption(rate, 0.5, batch_size=256) for rate in rates]

    def fit_from_scratch(self, indices, option, seed, fitted):
        """A Classifier around an untrained model, trained on these images.

        Its features are divided by their root mean square, because the linear layer learns
        slowly from small features (EXPERIMENTS.md, "Which scale of the features suits training
        from scratch?").
        """
        D, C = len(self.mean), len(self.classes)
        body = move_to_device(self.new_model(seed), self.device)
        size = max(2, images_a_batch(self.images.shape[1:], 250))         # for batch norm
        sample = indices[evenly_spaced(len(indices), size)]
        x = self.images[sample].to(self.device).float() / 255
        with torch.no_grad(), self.autocast:
            features = deepcopy(body).train().encode(x).float()           # (n, D)
        scale = features.square().mean().sqrt().clamp(min=1e-6).cpu().expand(D)
        classifier = Classifier(body, torch.zeros(D), scale, torch.zeros(D + 1, C))
        return self.train_classifier(classifier, indices, option, seed, smoothing=0.1)

    def fit_self_trained(self, indices, option, seed, fitted):
        return self.self_training.fit(indices, fitted["linear probe"])

    def fit_fine_tuned(self, indices, option, seed, fitted):
        """A Classifier around the pretrained model that starts as the linear probe.

        The probe's penalty ends here: crops are there instead. Keeping it was not measured.
        """
        weights = fitted["linear probe"].weights
        classifier = Classifier(deepcopy(self.model), self.mean, self.std, weights)
        return self.train_classifier(classifier, indices, option, seed, smoothing=0.0)

    def train_classifier(self, model, indices, option, seed, smoothing, images_seen=9600):
        """Train the whole Classifier on the images `indices`.

        From scratch and fine-tuned see the same number of images: `images_seen`, or 4 epochs
        if that is more. With the rate 0 they see none. option: an ImageOption; smoothing, of
        the labels.
        """
        rate, crop, batch_size, freeze_norm = option
        n = len(indices)
        size = images_a_batch(self.images.shape[1:], min(n, batch_size))
        size = max(2, size)                                               # for batch norm
        steps = max(images_seen, 4 * n) // size
        if rate == 0:
            steps = 0
        model = move_to_device(model, self.device)
        model.train(not freeze_norm)
        optimizers = self.optimizers(model, rate)
        batches = Batches(n, size, seed, "fine-tuning order")
        for step in range(steps):
            batch = indices[batches(step).numpy()]
            numbers = torch.rand(size, 11, generator=generator(seed, "fine-tuning views", step))
            x = contrastive.augment(
                self.images[batch].to(self.device), self.images.shape[2:],
                numbers.to(self.device), crop, jitter=0.2, hue=0.05, grey=0.0, flip=self.flip)
            labels = self.labels[batch].to(self.device)
            with self.autocast:
                logits = model(x)                                         # (B, C)
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            loss.backward()
            step_optimizers(optimizers, rate * lr_schedule(step, steps, 0.1 * steps, decay=1))
            if step % 10 == 0:
                progress(f"training on {n:,} labels, rate {rate}: step {step:,} of {steps:,}")
        return model.eval()

    def optimizers(self, model, rate):
        """Muon for the encoder's matrices and kernels; Adam for vectors and the linear layer."""
        muon, adam = muon_and_adam(model.body, rate, precision=self.precision)
        adam.add_param_group(dict(params=list(model.head.parameters()), lr_scale=0.1))
        return [muon, adam]

    @torch.no_grad()
    def predict(self, model, indices):
        images = self.images.select(indices)
        logits = image_features(model, images, self.autocast, self.device, mirror=self.flip)
        return logits.argmax(1)
