"""The columns of finetune.py's table for texts.

Fine-tuning trains the whole text encoder. The vector of a text is the mean of the vectors of its
windows: of at most eight in a training step, so that long texts fit into memory, and of all in
the test.
"""

import math
from copy import deepcopy
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minissl import transformer
from minissl.data.batches import Batches, generator
from minissl.data.splits import TEST, evenly_spaced
from minissl.evaluation import probes
from minissl.evaluation.classifier import Classifier
from minissl.evaluation.co_training import CoTraining, in_units
from minissl.evaluation.columns import MANY_LABELS, Column, Task, plain_column, standardize
from minissl.evaluation.features import document_vectors, no_progress, text_features
from minissl.evaluation.ngrams import make_ngrams
from minissl.optim import Muon, lr_schedule, step_optimizers
from minissl.training.files import progress
from minissl.training.machine import move_to_device


TEXT_LABELS = ["10", "100", "500", "all"]       # a class, the rows of the table
FEWEST_REFERENCES = 100     # with fewer held-out texts, training texts join the reference


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


class TextClassifier(Classifier):
    """A Classifier of the N texts of a table. Two columns ask for its answers, so it keeps them.

    Arguments: those of Classifier; N.
    """

    def __init__(self, body, mean, std, weights, N):
        super().__init__(body, mean, std, weights)
        C = weights.shape[1]
        self.answers = torch.full((N, C), math.nan)             # logits; nan where unknown


class TextOption(NamedTuple):
    """How a TextClassifier is trained."""
    rate: float             # the peak learning rate of Muon
    steps: int

    def __str__(self):
        if self.rate == 0:
            return "rate 0, so it stays the linear probe"
        return f"rate {self.rate:g}, {self.steps} steps"


class TextTask(Task):
    """Classification of texts.

    Arguments: texts, Texts; model, the pretrained TextEncoder; machine, what choose_machine
    returns; new_model(seed), which makes the same model untrained.
    """

    default_labels = TEXT_LABELS
    choice_draws = 2            # an option is tried on this many draws of labels

    def __init__(self, texts, model, machine, new_model):
        super().__init__(texts)
        self.device, self.precision, self.autocast = machine
        self.model = move_to_device(model, self.device)
        self.new_model = new_model
        self.texts = texts
        self.reference = self.held_out  # the texts over which logits are standardized
        if len(self.held_out) < FEWEST_REFERENCES:
            more = self.train[evenly_spaced(len(self.train), FEWEST_REFERENCES)]
            self.reference = np.concatenate([self.held_out, more])
        self.make_probe(text_features(self.model, texts, self.autocast, self.device, progress))

    @cached_property
    def co_training(self):
        """The learner of "self-trained". With --probe nothing needs it, and counting takes long."""
        progress("counting n-grams")
        # Texts without a label also say which n-grams are frequent. Otherwise, with few labelled
        # texts, the student would know few of the words that it could learn.
        n_grams = make_ngrams(self.texts, np.flatnonzero(self.texts.split != TEST))
        return CoTraining(self.probe, n_grams, self.pool, self.reference)

    def columns(self):
        """{name: column}, in the order of the table."""
        return {
            "n-grams": plain_column(self.co_training.n_grams),
            "from scratch": Column(
                self.fit_from_scratch, self.predict, options=self.scratch_options),
            "linear probe": plain_column(self.probe),
            "self-trained": Column(
                self.fit_self_trained,
                self.co_training.predict,
                needs=("n-grams", "linear probe"),
                is_random=False,
            ),
            "fine-tuned": Column(
                self.fit_fine_tuned,
                self.predict,
                needs=("linear probe",),
                options=self.fine_tuning_options,
                prefers_first=True,
            ),
            "all together": Column(
                self.fit_together, self.predict_together, needs=("self-trained", "fine-tuned")),
        }

    # The settings below come from EXPERIMENTS.md, "What does a transformer from scratch need?"
    # and "Does it help to fine-tune the whole transformer?".

    def scratch_options(self, n):
        if n > MANY_LABELS:
            return [TextOption(0.02, self.steps(n, epochs=4))]
        return [TextOption(0.02, 100 if n <= 1000 else 300)]

    def fine_tuning_options(self, n):
        """Up to MANY_LABELS the first is the probe, because at the rate 0 nothing is learned.

        With more labels the encoder is always trained.
        """
        if n <= MANY_LABELS:
            return [TextOption(0.0, 0), TextOption(0.003, 150), TextOption(0.01, 150)]
        return [TextOption(0.01, self.steps(n, epochs=2))]

    def steps(self, n, epochs):
        """The steps of about so many epochs of n texts, but at least 500."""
        size = texts_a_batch(self.texts.lengths[self.train])
        return max(500, epochs * n // size)

    def fit_self_trained(self, indices, option, seed, fitted):
        return self.co_training.fit(indices, fitted["linear probe"], fitted["n-grams"])

    def fit_from_scratch(self, indices, option, seed, fitted):
        """A TextClassifier around an untrained encoder, trained on these texts.

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
        classifier = TextClassifier(body, mean, std, torch.zeros(d + 1, C), len(self.texts))
        return self.train_classifier(
            classifier, indices, option, seed, strength=0, embedding_scale=0.15)

    def fit_fine_tuned(self, indices, option, seed, fitted):
        """A TextClassifier around the pretrained encoder that starts as the linear probe."""
        probe = fitted["linear probe"]
        body = WholeTextEncoder(deepcopy(self.model), self.autocast, self.device)
        classifier = TextClassifier(body, self.mean, self.std, probe.weights, len(self.texts))
        self.train_classifier(
            classifier, indices, option, seed, probe.strength, embedding_scale=0.3)
        if option.rate == 0:    # then it says what the probe says, and need not read any text
            classifier.answers = probes.linear_logits(self.probe.x, probe.weights)
        return classifier

    def fit_together(self, indices, option, seed, fitted):
        """(the CoTrained of "self-trained", the TextClassifier of "fine-tuned")"""
        return fitted["self-trained"], fitted["fine-tuned"]

    def train_classifier(self, model, indices, option, seed, strength, embedding_scale):
        """Train the whole TextClassifier on the texts `indices`.

        option: a TextOption; strength: the L2 penalty of the linear layer, as in the probe;
        embedding_scale: the embeddings and the linear layer learn at this share of the rate of
        the blocks.
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
        """What a TextClassifier says about these texts, (n, C)."""
        is_unknown = classifier.answers[indices].isnan().any(1)           # (n,)
        unknown = indices[is_unknown.numpy()]
        if len(unknown):
            classifier.answers[unknown] = classifier(self.texts.select(unknown))
        return classifier.answers[indices]

    def predict(self, model, indices):
        return self.logits(model, indices).argmax(1)

    def predict_together(self, model, indices):
        return self.logits_together(model, indices).argmax(1)

    def logits_together(self, model, indices):
        """(n, C): the sum of probe and fine-tuned encoder, plus the n-grams.

            both = unit(unit(probe) + unit(fine-tuned))
            answer = both + unit(n-grams)

        where unit divides by the standard deviation over the reference texts. At rate 0 the
        answer orders the classes as the column "self-trained" does. (EXPERIMENTS.md, "What do
        n-grams add to the document vector?")
        """
        co_trained, classifier = model

        def logits_of_both(indices):
            """Probe and fine-tuned encoder, (n, C)."""
            tuned = self.logits(classifier, indices)
            tuned = in_units(tuned, self.logits(classifier, self.reference))
            return self.co_training.probe_logits(co_trained, indices) + tuned

        both = in_units(logits_of_both(indices), logits_of_both(self.reference))
        return both + self.co_training.student_logits(co_trained, indices)
