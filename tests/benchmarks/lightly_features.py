"""How good are the features of lightly's SimCLR example after the same minutes?

    python tests/benchmarks/lightly_features.py            ten minutes, then the probe, on CIFAR-10
    python tests/benchmarks/lightly_features.py --minutes 0   the control: the same, untrained
    python tests/benchmarks/lightly_features.py --minutes 0.2 --limit 300   a quick trial

contrastive.py measures the speed of a step alone, with one encoder on both sides. This program
trains what one would take instead, lightly's own example for CIFAR-10, and measures what it has
learned. It needs `pip install lightly torchvision`.

    encoder       torchvision's ResNet-18 without its last layer, 512 features
    head          lightly's SimCLRProjectionHead(512, 512, 128)
    views         SimCLRTransform(input_size=32), made by two data-loading workers
                  (the example has eight)
    loss          NTXentLoss(), which has the temperature 0.5
    training      SGD with a constant learning rate of 0.06, batches of 256, float32

The minutes are the wall time of the training alone. The probe does not count. The process gets
keep_freed_memory() of minissl, as in contrastive.py. The images and their split are those of
train_contrastive.py, so held-out images and test images are not trained on. The table is that of
`finetune.py RUN --probe`, by the same code: the mean of the features of an image and of its
mirror image, the same standardization, the same draws of labels, the same logistic regression,
the same test set.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from timed_training import print_probe, train_for

import finetune
from minissl import UserError
from minissl.data.images import load_images
from minissl.data.splits import TRAIN
from minissl.evaluation.image_table import ImageTask
from minissl.training.machine import choose_machine
from minissl.training.settings import read_settings, require_above, require_at_least, run_script


missing = ""
try:
    import lightly
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from lightly.transforms.utils import IMAGENET_NORMALIZE
    from PIL import Image
except (ImportError, RuntimeError) as error:        # RuntimeError: torchvision for another torch
    missing = (f"lightly or torchvision cannot be imported ({error}): "
               f"pip install lightly torchvision, in the versions that fit this torch")


# ---------------------------------------------------------------- settings

@dataclass
class Settings:
    data: str = "cifar10"  # as for train_contrastive.py: colour images with labels
    data_dir: str = "data"  # the folder for downloads
    limit: int = 0  # for a trial: this many each for training, held-out, test; 0: all
    minutes: float = 10  # wall time of the training; 0: leave the model untrained
    seed: int = 0  # of the weights, the order and the views
    batch_size: int = 256  # images in a step
    learning_rate: float = 0.06  # constant
    workers: int = 2  # processes that make views
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "float32"  # the example's

    def __post_init__(self):
        require_at_least(self, 2, "batch_size")
        require_at_least(self, 0, "limit", "minutes", "workers")
        require_above(self, 0, "learning_rate")


# ---------------------------------------------------------------- the example

class Pictures(torch.utils.data.Dataset):
    """Two views of each of our Images, as lightly makes them of a PIL image."""

    def __init__(self, images):
        self.images = images
        self.transform = SimCLRTransform(input_size=32)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        pixels = self.images[i].permute(1, 2, 0)                          # (H, W, C)
        return self.transform(Image.fromarray(pixels.numpy()))


class SimCLR(nn.Module):
    """The model of the example. `encode` is what a probe reads."""

    def __init__(self):
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.head = SimCLRProjectionHead(512, 512, 128)
        for name, values in IMAGENET_NORMALIZE.items():                   # mean and std
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, x):
        """Projections (B, 128) of views (B, 3, H, W), which are normalized already."""
        return self.head(self.backbone(x).flatten(1))

    def encode(self, x):
        """Features (B, 512) of images (B, 3, H, W), floats in [0, 1]."""
        return self.backbone((x - self.mean) / self.std).flatten(1)


def train(settings, model, loader, device, autocast):
    """Train the model until the time is over: a dict, as `train_for` returns it."""
    optimizer = torch.optim.SGD(model.parameters(), settings.learning_rate)
    criterion = NTXentLoss()
    model.train()

    def train_step(views, share):
        first, second = views
        with autocast:
            z0 = model(first.to(device))                                  # (B, 128)
            z1 = model(second.to(device))
        loss = criterion(z0.float(), z1.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), len(first)

    chance = math.log(2 * settings.batch_size - 1)
    return train_for(settings.minutes, loader, train_step, "images", chance)


def main():
    settings = read_settings(Settings, __doc__)
    if missing:
        raise UserError(missing)
    print(f"lightly {lightly.__version__}, torchvision {torchvision.__version__}, "
          f"torch {torch.__version__}")
    device, precision, autocast = choose_machine(settings)

    # ------------------------------------------------------------ Data

    data = load_images(settings.data, settings.data_dir, settings.limit)
    C, H, W = data.shape[1:]
    if C != 3:
        raise UserError(f"--data {settings.data}: found images of {H} × {W} × {C}; "
                        f"the example needs colour images")
    labelled = finetune.keep_complete_classes(data, settings.data)
    train_images = data.subset(TRAIN)
    if len(train_images) < settings.batch_size:
        raise UserError(f"--batch-size {settings.batch_size}: there are only "
                        f"{len(train_images)} images to learn from; give a larger --limit or a "
                        f"smaller --batch-size")
    print(f"data: {settings.data}, {len(train_images):,} images of {H} × {W} × {C} to learn from")

    # ------------------------------------------------------------ Training

    torch.manual_seed(settings.seed)                # the workers' seeds follow from it
    model = SimCLR().to(device)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    loader = torch.utils.data.DataLoader(
        Pictures(train_images),
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=settings.workers,
    )
    figures = dict(steps=0)
    if settings.minutes > 0:
        figures = train(settings, model, loader, device, autocast)

    # ------------------------------------------------------------ Table

    machine = device, precision, autocast
    task = ImageTask(labelled, model, machine, new_model=None, flip=True, code=None)
    print_probe(task, settings.limit, figures)


if __name__ == "__main__":
    run_script(main)
