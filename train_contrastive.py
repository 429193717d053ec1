"""Pretrain an image encoder without labels.

The method is SimCLR: it recognises views of the same image. BYOL is `--method byol`.
minissl/contrastive.py explains the losses and the models.

    python train_contrastive.py                               drawn shapes, a few minutes
    python train_contrastive.py --data cifar10 --run runs/cifar --width 64 --steps 3000  photographs
    python train_contrastive.py --method byol --run runs/byol
    python train_contrastive.py --data my_images.npy --run runs/my-images
                                           your own: uint8 (N, H, W, C) or (N, H, W)
    python train_contrastive.py --steps 200 --run runs/quick  on a slow laptop
    torchrun --nproc-per-node 2 -- train_contrastive.py --run runs/two      two processes
    python train_contrastive.py --run runs/my-images --resume               continue a run
    python finetune.py RUN                                    measure whether it helped

`diff train_ae.py train_contrastive.py` shows how the two methods differ.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from minissl import UserError, contrastive
from minissl.data.batches import Batches, generator
from minissl.data.images import describe, load_images, mean_and_whitening
from minissl.data.splits import TRAIN
from minissl.evaluation import previews
from minissl.optim import lr_schedule, muon_and_adam, step_optimizers
from minissl.training.distributed import (
    all_gather,
    average_gradients,
    main_process_first,
    shard,
    sync_batch_norm,
)
from minissl.training.machine import choose_machine, move_to_device
from minissl.training.run import Run
from minissl.training.settings import (
    flag_name,
    read_settings,
    require_above,
    require_at_least,
    require_at_most,
    run_script,
)


# ---------------------------------------------------------------- Settings

@dataclass
class Settings:
    data: str = "shapes"  # shapes, cifar10, or a .npy of uint8 images (N, H, W, C) or (N, H, W)
    data_dir: str = "data"  # the folder for downloads
    limit: int = 0  # for a trial: at most this many examples of each split; 0: all
    run: str = "runs/contrastive"  # the folder of the run
    resume: bool = False  # continue the run in --run
    steps: int = 600  # optimizer steps
    learning_rate: float = 0.02  # peak rate of matrices and kernels; vectors take a tenth
    width: int = 32  # channels of the first feature map; 64 is better, in nearly 4 times the time
    seed: int = 0  # seed of all random numbers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that torch finds
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one, measured
    compile: bool = False  # torch.compile the model; it takes a minute at the start
    method: Literal["simclr", "byol"] = "simclr"  # with negatives, or with a second network
    views: int = 4  # number of views of each image
    batch_size: int = 128  # images in a step, each seen in all its views
    view_size: int = 0  # height of a view in pixels, even; 0: three quarters of the image
    temperature: float = 0.15  # temperature of SimCLR's softmax
    similarity: Literal["cosine", "dot"] = "cosine"  # how SimCLR compares two projections
    target_rate: float = 0.9  # rate of BYOL's moving average at the start; it rises to 1
    crop: float = -1  # smallest share of the area in a view; below 0: as suits the data
    jitter: float = -1  # strength of brightness, contrast, saturation; below 0: as suits the data
    hue: float = -1  # largest change, as a share of the colour circle; below 0: as suits the data
    grey: float = -1  # share of views without colour; below 0: as suits the data
    no_flip: bool = False  # no mirror images: for digits, letters and the like
    evaluate_every: int = 200  # steps between two previews
    save_every: float = 30  # seconds between two checkpoints

    def __post_init__(self):
        is_drawn = self.data == "shapes"
        defaults = contrastive.VIEWS_OF_SHAPES if is_drawn else contrastive.VIEWS_OF_PHOTOGRAPHS
        for name, value in defaults.items():
            if getattr(self, name) < 0:
                setattr(self, name, value)
        require_at_least(self, 1, "steps", "width", "evaluate_every")
        require_at_least(self, 0, "limit", "save_every")
        require_at_least(self, 2, "batch_size", "views")
        require_at_least(self, 0, "view_size", "target_rate")
        require_above(self, 0, "learning_rate", "temperature", "crop")
        require_at_most(self, 1, "crop", "jitter", "grey", "target_rate")
        require_at_most(self, 0.5, "hue")                                 # half of the circle
        if 0 < self.view_size < 8 or self.view_size % 2:
            raise UserError(f"--view-size {self.view_size}: must be even, and at least 8")
        unused = ["temperature", "similarity"] if self.method == "byol" else ["target_rate"]
        for name in unused:
            # A resumed run may have the default of an older version.
            if not self.resume and getattr(self, name) != getattr(Settings, name):
                raise UserError(
                    f"{flag_name(name)}: leave it out, --method {self.method} has none"
                )


# ---------------------------------------------------------------- The loss

def simclr_loss(model, views, settings):
    """SimCLR: find the other views of an image among all views of all processes.

    Returns the loss to minimize, and the losses for the log.
    """
    projections = all_gather(model(views), dim=1)                         # (V, B, D)
    loss = contrastive.info_nce(projections, settings.temperature, settings.similarity)
    return loss, dict(loss=loss)


def byol_loss(model, views, settings):
    """BYOL: predict what the target network makes of the other views of the same image.

    Returns the loss to minimize, and the losses for the log.
    """
    predictions, targets = model(views)                                   # (V, B, D) each
    loss = contrastive.byol_loss(predictions, targets)
    return loss, dict(loss=loss)


def main():
    settings = read_settings(Settings, __doc__)
    run = Run(settings)
    device, precision, autocast = choose_machine(settings)

    # ------------------------------------------------------------ Data

    with main_process_first():                                            # one download for all
        data = load_images(settings.data, settings.data_dir, settings.limit)
    # The model learns from the training images alone. Held-out images are for the previews and
    # for choices, test images for finetune.py.
    # The training images move to the GPU if they fit; otherwise each batch moves.
    train_images = data.subset(TRAIN).to(device)                          # N images, uint8
    N, C, H, W = train_images.shape
    print(f"data: {settings.data}, {N:,} images of {H} × {W} × {C} to learn from")
    for note in data.notes:
        print(f"data: {note}")

    B = settings.batch_size
    batches = Batches(N, B, settings.seed, "image order")

    V = settings.views
    size = contrastive.view_shape(H, W, settings.view_size)               # (h, w) of a view

    def random_numbers(count, purpose, step):
        """Uniform numbers (count, V, 11). They decide how the views of each image look.

        The images are the first axis, so that each process can take its share.
        """
        rng = generator(settings.seed, purpose, step)
        return torch.rand(count, V, 11, generator=rng)

    def make_views(images, numbers):
        """Views (V, B, C, h, w) in [0, 1] of images (B, C, H, W) uint8; numbers (B, V, 11)."""
        numbers = numbers.to(images.device)
        changes = dict(crop=settings.crop, jitter=settings.jitter, hue=settings.hue,
                       grey=settings.grey, flip=not settings.no_flip)
        views = []
        for of_view in numbers.unbind(1):                                 # (B, 11)
            views.append(contrastive.augment(images, size, of_view, **changes))
        return torch.stack(views)

    # ------------------------------------------------------------ Model

    # The arguments of the model go into the checkpoint, so that finetune.py can build it.
    torch.manual_seed(settings.seed)
    model_settings = dict(width=settings.width, **mean_and_whitening(train_images))
    if settings.method == "byol":
        model = contrastive.BYOL(**model_settings)
        compute_loss, chance = byol_loss, dict(loss=2.0)                  # unrelated vectors
        weight_decay = 0.2      # EXPERIMENTS.md, "What does BYOL need with four views?"
    else:
        model = contrastive.SimCLR(**model_settings)
        compute_loss, chance = simclr_loss, dict(loss=contrastive.chance_level(V, B))
        weight_decay = 0.02     # EXPERIMENTS.md, "Does more weight decay help SimCLR?"
    # Batch norm takes its statistics from the batches of all processes.
    model = move_to_device(sync_batch_norm(model), device)
    # Muon trains matrices and kernels, Adam trains vectors: see minissl/optim.py.
    optimizers = muon_and_adam(
        model, settings.learning_rate, weight_decay, precision
    )

    def learning_rate(step):
        """It rises for a twentieth of the steps, then falls linearly to 0."""
        warmup = settings.steps // 20
        return settings.learning_rate * lr_schedule(step, settings.steps, warmup, decay=1)

    # ------------------------------------------------------------ Run

    preview = previews.ContrastivePreview(
        data, random_numbers, make_views, run.folder, autocast, device,
        mirror=not settings.no_flip,
    )
    # This makes the folder of the run. A resumed run loads its checkpoint here.
    first_step = run.begin(
        model,
        optimizers,
        data=describe(data),
        method=settings.method,
        model_settings=model_settings,
        chance=chance,
        preview=preview,
    )
    preview.write_views()
    if settings.compile:
        model.compile()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model: {parameters:,} parameters")

    # ------------------------------------------------------------ Training

    # Everything random in a step is a function of the seed and the step. Of each batch,
    # every process takes its share; a single process takes all of it.
    for step in range(first_step, settings.steps):
        numbers = random_numbers(B, "view", step)
        indices, numbers = shard(batches(step), numbers)                  # this process's share
        images = train_images[indices].to(device)                         # (B, C, H, W)
        views = make_views(images, numbers)                               # (V, B, C, h, w)
        with autocast:
            loss, losses = compute_loss(model, views, settings)
        loss.backward()
        average_gradients(model)
        step_optimizers(optimizers, learning_rate(step))
        if settings.method == "byol":
            model.update_target(contrastive.target_rate(step, settings.steps, settings.target_rate))
        run.end_step(step, losses, items=len(images))
    run.finish()


if __name__ == "__main__":
    run_script(main)
