"""A fourth pretext task, whole: which way up is this image? Turned by 0, 90, 180 or 270 degrees, four classes.

    python tests/fourth_task.py --run runs/rotation             shapes; a minute

Gidaris et al. 2018, arXiv 1803.07728. An example to copy, and test_fourth_task.py runs it: the model file's part and
the script's part stand here in one file; in a fork they would be minissl/rotation.py and train_rotation.py. (On shapes,
which lie at any angle, there is little to learn from this task but the light; on photographs there is.)
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minissl import evaluation, runs
from minissl.contrastive import ImageEncoder
from minissl.datasets import TRAIN
from minissl.images import describe, load_images, mean_and_deviation
from minissl.muon import Muon
from minissl.training import Batches, Run, choose_machine, count_flops, rate_at, read_settings, run_script, take_step


# ---------------------------------------------------------------- 1. the model file
# A model with `encode`, and its loss.

class RotationModel(nn.Module):
    def __init__(self, mean, deviation, width=32):
        super().__init__()
        self.channels, self.encoder, self.head = (len(mean), ImageEncoder(mean, deviation, width),
                                                  nn.Linear(4 * width, 4))

    def encode(self, x):
        """Images (B, C, H, W), floats in [0, 1] -> (B, D)."""
        return self.encoder(x)


def rotation_loss(model, x):
    """Cross-entropy of the four ways up, the mean over 4B images; ln 4 for a guess. x (B, C, H, H)."""
    turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])                    # (4B, C, H, H)
    ways = torch.arange(4, device=x.device).repeat_interleave(len(x))            # (4B,)
    return F.cross_entropy(model.head(model.encode(turned)).float(), ways)


# ---------------------------------------------------------------- 2. runs.py learns its name

runs.MODELS["rotation"] = RotationModel


# ---------------------------------------------------------------- 3. the script: settings, data, model, steps

@dataclass
class Settings:
    data: str = "shapes"  # shapes, cifar10, or a .npy of square uint8 images
    data_dir: str = "data"  # where archives lie
    limit: int = 0  # take this many images of each split only; 0: all
    run: str = "runs/rotation"  # the run's folder
    resume: bool = False  # go on with the run in --run
    steps: int = 300  # optimizer steps
    batch_size: int = 64  # images a step, each seen four ways up
    learning_rate: float = 0.02  # Muon's; Adam's on vectors is a tenth
    width: int = 32  # of the encoder's first feature map
    seed: int = 0  # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is measurably faster
    evaluate_every: int = 100  # steps
    save_every: float = 30  # seconds


def main():
    settings = read_settings(Settings, __doc__)
    run = Run(settings)
    device, precision, cast, peak = choose_machine(settings)
    data = load_images(settings.data, settings.data_dir, settings.limit)
    pool, B = data.of(TRAIN).to(device), settings.batch_size
    batches = Batches(len(pool), B, settings.seed, "image order")

    torch.manual_seed(settings.seed)
    shape = dict(width=settings.width, **mean_and_deviation(pool))
    model = RotationModel(**shape).to(device, memory_format=torch.channels_last)
    optimizers = [Muon([p for p in model.parameters() if p.ndim > 1], settings.learning_rate, precision=precision),
                  torch.optim.Adam([dict(params=[p for p in model.parameters() if p.ndim == 1], times=0.1)])]
    first = run.begin(model, optimizers, peak, describe(data), method="rotation", model_settings=shape)
    neighbours = evaluation.Neighbours(data, device)
    look = lambda model: dict(knn=neighbours(model.encode, cast, run.folder))
    flops = count_flops(model, lambda: model.encode(torch.zeros(4, *pool.shape[1:], device=device)))

    for step in range(first, settings.steps):
        with cast:
            loss = rotation_loss(model, pool[batches(step)].to(device).float() / 255)
        loss.backward()
        run.count(B, 3 * flops * B, loss)
        take_step(optimizers, settings.learning_rate * rate_at(step, settings.steps, warmup=20, decay=1))
        run.after(step, run.stopping, look, dict(loss=math.log(4)))


if __name__ == "__main__":
    run_script(main)
