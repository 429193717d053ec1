"""A further pretext task in one file: which way up is this image?

Turn each image by 0, 90, 180 and 270 degrees, and let the encoder tell the four apart. In a
photograph, the sky is above and feet are below, so whoever can tell has learned what things
look like. The answers come from the turning itself, so no label is needed.

    L = −1/(4B) Σ_b Σ_k log softmax(g(f(turn(x_b, k · 90°))))[k]

f is the encoder of contrastive.py, and g one linear layer. Guessing costs ln 4. After the
training g is dropped.

    Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations",
    arXiv 1803.07728

Differences from the paper:
- The encoder is the small ResNet of contrastive.py, not AlexNet or Network in Network.
- Muon and Adam train it, for minutes. The paper takes SGD and many epochs.
- The features are the mean over the last map alone, to keep the file short. In the paper, earlier
  maps give better features: the last ones know more about the turn and less about the object.
  (SimCLR.encode in contrastive.py reads three depths. For this task that was not measured.)

    python examples/rotation.py                               drawn shapes, a minute or two
    python examples/rotation.py --data cifar10 --run runs/rotation-cifar --steps 1000
    python examples/rotation.py --run runs/rotation --resume  continue a run
    python examples/rotation.py finetune runs/rotation        measure whether it helped

The drawn shapes lie at any angle, so they do not tell which way up they are, and the loss stays
close to its chance level, ln 4 = 1.386. (The faint stripes of the background do tell a little:
they begin at the upper left corner.) Photographs have an up and a down: try `--data cifar10`.

In your own copy of minissl, use two files: minissl/rotation.py for the model and the loss, with
a line in MODELS of minissl/evaluation/load.py, and train_rotation.py for the rest. finetune.py
then takes its runs directly.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to start it from anywhere

import finetune
from minissl import UserError
from minissl.contrastive import ImageEncoder
from minissl.data.batches import Batches
from minissl.data.images import describe, load_images, mean_and_whitening
from minissl.data.splits import TRAIN
from minissl.evaluation import load
from minissl.evaluation.previews import NeighbourPreview
from minissl.optim import lr_schedule, muon_and_adam, step_optimizers
from minissl.training.distributed import (
    average_gradients,
    main_process_first,
    shard,
    sync_batch_norm,
)
from minissl.training.machine import choose_machine, move_to_device
from minissl.training.run import Run
from minissl.training.settings import read_settings, require_above, require_at_least, run_script


# ---------------------------------------------------------------- Settings

@dataclass
class Settings:
    data: str = "shapes"  # shapes, cifar10, or a .npy of square uint8 images
    data_dir: str = "data"  # the folder for downloads
    limit: int = 0  # use only this many images of each split, for a trial; 0: all
    run: str = "runs/rotation"  # the folder of the run
    resume: bool = False  # continue the run in --run
    steps: int = 300  # optimizer steps
    batch_size: int = 64  # images in a step, each seen four ways up
    learning_rate: float = 0.02  # of Muon, on matrices and kernels; of Adam a tenth
    width: int = 32  # of the first feature map
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that torch finds
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one, measured
    evaluate_every: int = 100  # steps between two previews
    save_every: float = 30  # seconds between two checkpoints

    def __post_init__(self):
        require_at_least(self, 1, "steps", "batch_size", "width", "evaluate_every")
        require_at_least(self, 0, "limit", "save_every")
        require_above(self, 0, "learning_rate")


# ---------------------------------------------------------------- The model

class RotationModel(nn.Module):
    """An image encoder with a layer that tells four directions apart.

    Arguments: mean, whitening and width as for ImageEncoder.
    """

    def __init__(self, mean, whitening, width=32):
        super().__init__()
        self.channels = len(mean)                             # finetune.py asks for it
        self.encoder = ImageEncoder(mean, whitening, width)
        self.head = nn.Linear(4 * width, 4)

    def encode(self, x):
        """Images (B, C, H, W), floats in [0, 1] -> features (B, 4 · width)."""
        return self.encoder(x)

    def forward(self, x):
        """Images (B, C, H, W) -> logits (B, 4)."""
        return self.head(self.encode(x))


# finetune.py builds the model of a run by this name, see `method` below.
load.MODELS["rotation"] = RotationModel


# ---------------------------------------------------------------- The loss

def turn(images):
    """Images (B, C, H, H) -> all four ways up (4B, C, H, H), and the answers (4B,) int64.

    The first B are as they were, the next B are turned by 90 degrees, and so on.
    """
    turned = [images.rot90(k, dims=(2, 3)) for k in range(4)]
    answers = torch.arange(4, device=images.device).repeat_interleave(len(images))
    return torch.cat(turned), answers


def rotation_loss(model, images):
    """Tell the four ways up apart: cross-entropy, the mean over 4B turned images."""
    turned, answers = turn(images)
    logits = model(turned)                                                # (4B, 4)
    loss = F.cross_entropy(logits.float(), answers)
    return loss, dict(loss=loss)


def main():
    settings = read_settings(Settings, __doc__)
    run = Run(settings)
    device, precision, autocast = choose_machine(settings)

    # ------------------------------------------------------------ Data

    with main_process_first():
        data = load_images(settings.data, settings.data_dir, settings.limit)
    train_images = data.subset(TRAIN).to(device)                          # N images, uint8
    N, C, H, W = train_images.shape
    print(f"data: {settings.data}, {N:,} images of {H} × {W} × {C} to learn from")
    for note in data.notes:
        print(f"data: {note}")
    if H != W:
        raise UserError(f"--data {settings.data}: images of {H} × {W} are not square; crop them")
    batches = Batches(N, settings.batch_size, settings.seed, "image order")

    # ------------------------------------------------------------ Model

    torch.manual_seed(settings.seed)
    model_settings = dict(width=settings.width, **mean_and_whitening(train_images))
    model = RotationModel(**model_settings)
    model = move_to_device(sync_batch_norm(model), device)
    optimizers = muon_and_adam(model, settings.learning_rate, precision=precision)

    def learning_rate(step):
        return settings.learning_rate * lr_schedule(step, settings.steps, warmup=20, decay=1)

    # ------------------------------------------------------------ Run

    neighbours = NeighbourPreview(data, run.folder, autocast, device)

    def preview(model):
        return dict(knn=neighbours(model.encode))

    first_step = run.begin(
        model,
        optimizers,
        data=describe(data),
        method="rotation",
        model_settings=model_settings,
        chance=dict(loss=math.log(4)),
        preview=preview,
    )

    # ------------------------------------------------------------ Training

    for step in range(first_step, settings.steps):
        indices, = shard(batches(step))                                   # this process's share
        images = train_images[indices].to(device).float() / 255           # (B, C, H, H)
        with autocast:
            loss, losses = rotation_loss(model, images)
        loss.backward()
        average_gradients(model)
        step_optimizers(optimizers, learning_rate(step))
        run.end_step(step, losses, items=len(images))
    run.finish(f"python {sys.argv[0]} finetune")


if __name__ == "__main__":
    if sys.argv[1:2] == ["finetune"]:
        del sys.argv[1]
        run_script(finetune.main)       # finetune.py, which now knows the class above
    else:
        run_script(main)
