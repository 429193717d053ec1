"""An encoder with a linear layer on its features, and the file in which it is kept.

Fine-tuning trains a Classifier. finetune.py keeps that of the row with the most labels in
classifier.pt of the run's folder, and `finetune.py --predict` reads it.
"""

import shlex
from pathlib import Path

import torch
from torch import nn

from minissl import UserError
from minissl.contrastive import without_autocast
from minissl.training.files import read_checkpoint, write_checkpoint


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
        with without_autocast(z.device):
            return self.head(z)


# ---------------------------------------------------------------- classifier.pt

CLASSIFIER_FORMAT = "minissl classifier 6"
CONDITIONS = ("step", "classes", "shape", "flip", "data", "limit", "labels", "checksum")


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
    or if the classifier does not fit this encoder.
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
