"""Pretrain an image encoder without labels: recognise two views of one image (SimCLR, or BYOL).

    python train_contrastive.py                                 shapes that our own code draws, a few minutes
    python train_contrastive.py --data cifar10 --run runs/cifar --width 64 --steps 2750
    python train_contrastive.py --method byol --run runs/byol
    python train_contrastive.py --data my_images.npy --run runs/mine         your own: uint8 (N, H, W, C) or (N, H, W)
    python train_contrastive.py --steps 200 --run runs/quick    a slow laptop: a third of the time
    torchrun --nproc-per-node 2 -- train_contrastive.py         several processes that make the step of one
    python train_contrastive.py --run runs/mine --resume        go on where Ctrl-C stopped
    python finetune.py runs/contrastive                         what was it worth? a table

Read it beside its sibling: `diff train_ae.py train_contrastive.py` prints the method and little else.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from minissl import UserError, contrastive, evaluation, figures
from minissl.datasets import HELD_OUT, TRAIN
from minissl.images import describe, load_images, mean_and_deviation
from minissl.muon import Muon
from minissl.processes import RANK, average_gradients, first_alone, gather, share, share_batch_norm
from minissl.training import (Batches, Run, at_least, choose_machine, count_flops, generator, rate_at, read_settings,
                              run_script, take_step)


# ---------------------------------------------------------------- Settings

# The views say what does not matter. In shapes colour does not, and a small crop holds no shape: with the photographs'
# views the encoder recognises the colours, and the loss falls all the same (EXPERIMENTS.md).
USUAL = {"shapes": dict(crop=0.5, jitter=0.8, hue=0.5, grey=0.4),
         "photographs": dict(crop=0.2, jitter=0.4, hue=0.1, grey=0.2)}


@dataclass
class Settings:
    data: str = "shapes"  # shapes, cifar10, or a .npy of uint8 images (N, H, W, C) or (N, H, W)
    data_dir: str = "data"  # where archives lie
    limit: int = 0  # take this many images of each split only, for a trial; 0: all
    run: str = "runs/contrastive"  # the run's folder
    resume: bool = False  # go on with the run in --run
    steps: int = 600  # optimizer steps
    batch_size: int = 256  # images a step; no gradient accumulation: negatives and batch norm would not see the rest
    learning_rate: float = 0.02  # Muon's, on matrices and kernels; Adam's on vectors is a tenth
    width: int = 32  # of the encoder's first feature map, doubled twice; 64 sees more, in nearly four times the time
    seed: int = 0  # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is measurably faster
    compile: bool = False  # torch.compile the encoder: a minute first; meant for a GPU, not measured
    method: Literal["simclr", "byol"] = "simclr"  # with negatives, or with a slow second network
    views: int = 2  # of each image; 4 gave no more at equal time (a prototype, as the next two)
    view_size: int = 0  # height of a view in pixels, even; 0: three quarters of the image's, +2 points at equal time
    temperature: float = 0.15  # of SimCLR's softmax; 0.1 to 0.4 were alike
    similarity: Literal["cosine", "dot"] = "cosine"  # of two projections
    target_rate: float = 0.98  # of BYOL's moving average at the start; it rises to 1
    crop: float = -1  # least share of the image's area in a view; below 0: as usual for the data (so the next three)
    jitter: float = -1  # strength of brightness, contrast and saturation
    hue: float = -1  # turns
    grey: float = -1  # share of views without colour
    no_flip: bool = False  # for pictures whose mirror image means something else: digits, letters
    evaluate_every: int = 200  # steps
    save_every: float = 30  # seconds; a run that is killed loses no more

    def __post_init__(self):
        at_least(self, 1, "steps", "width", "evaluate_every")
        at_least(self, 2, "batch_size", "views")
        for name, value in USUAL.get(self.data, USUAL["photographs"]).items():
            if getattr(self, name) < 0:
                setattr(self, name, value)
        at_least(self, 0, "limit", "jitter", "hue", "grey", "target_rate")
        at_least(self, 1e-9, "learning_rate", "temperature", "crop")
        for name in ("crop", "jitter", "grey", "target_rate"):
            if getattr(self, name) > 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at most 1")
        if self.method == "byol" and (self.temperature, self.similarity) != (Settings.temperature, Settings.similarity):
            raise UserError("--method byol has neither --temperature nor --similarity: leave them out")
        if self.view_size and self.view_size < 8:
            raise UserError(f"--view-size {self.view_size}: the encoder needs at least 8 pixels")


# ---------------------------------------------------------------- What it has learned so far

class Look:
    """Called with the model: what the loss does not show, on held-out images; pictures of it in the run's folder."""

    def __init__(self, data, folder, draw, view, cast, device):
        self.folder, self.cast, self.device = folder, cast, device
        held_out = data.of(HELD_OUT, 512)
        self.pair = torch.stack([view(held_out[:], draw(len(held_out), "look", n))
                                 for n in range(2)])                                             # (2, B, C, h, w)
        self.neighbours = evaluation.Neighbours(data, device)

    @torch.no_grad()
    def __call__(self, model):
        with self.cast:
            z = model.project(self.pair.to(self.device)).float().cpu()                           # (2, B, D)
        accuracy = self.neighbours(model.encode, self.cast, self.folder)
        return dict(alignment=round(float(contrastive.alignment(z)), 4),
                    uniformity=round(float(contrastive.uniformity(z[0])), 4),
                    effective_rank=round(float(contrastive.effective_rank(z[0])), 2), knn=accuracy)


# ---------------------------------------------------------------- Training

def main():
    settings = read_settings(Settings, __doc__)
    run = Run(settings)
    device, precision, cast, peak = choose_machine(settings)
    with first_alone():
        data = load_images(settings.data, settings.data_dir, settings.limit)
    pool = data.of(TRAIN).to(device)                                     # N images (C, H, W) uint8
    V, B, (C, H, W) = settings.views, settings.batch_size, pool.shape[1:]
    print(f"data: {settings.data}, {len(pool):,} images of {H} × {W} × {C} to learn from"
          + "".join(f"; {note}" for note in data.notes))
    batches = Batches(len(pool), B, settings.seed, "image order")
    height = settings.view_size or 0.75 * H
    size = [max(8, 2 * round(side * height / H / 2)) for side in (H, W)]  # even, in the proportions of the image

    def draw(n, purpose, step):
        return torch.rand(n, 12, generator=generator(settings.seed, purpose, step))

    def view(images, numbers):
        return contrastive.augment(images, size, numbers.to(images.device), settings.crop, settings.jitter,
                                   settings.hue, settings.grey, not settings.no_flip)

    torch.manual_seed(settings.seed)
    byol = settings.method == "byol"
    shape = dict(byol=byol, width=settings.width, **mean_and_deviation(pool))
    model = contrastive.ContrastiveModel(**shape).to(device, memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    optimizers = [Muon(matrices, settings.learning_rate, weight_decay=0.02, precision=precision),    # decay 0.1: alike
                  torch.optim.Adam([dict(params=vectors, times=0.1)], fused=device.type != "mps")]
    first = run.begin(share_batch_norm(model), optimizers, peak, describe(data),
                      method="contrastive", model_settings=shape)
    look = Look(data, run.folder, draw, view, cast, device)
    flops = count_flops(model, lambda: model.project(torch.zeros(V, 1, C, *size, device=device)))  # an image's, forward
    if settings.compile:
        model.encoder.compile()
    print(f"views: crops of at least {settings.crop} of the area, colour jitter {settings.jitter}, hue {settings.hue}, "
          f"grey {settings.grey} (usual for {'this data' if settings.data in USUAL else 'photographs'}, unless given)")
    print(f"model: {sum(p.numel() for p in trained):,} parameters; views of {size[0]} × {size[1]}, "
          f"{flops / 2e6:,.0f} million multiply-adds an image")

    for step in range(first, settings.steps):
        images = pool[share(batches(step))].to(device)                   # (B, C, H, W): of several processes, a slice
        views = torch.stack([view(images, share(draw(B, f"view {n}", step))) for n in range(V)])       # (V, B, C, h, w)
        if step == 0 and not RANK:
            figures.write_png(run.folder / "views.png", figures.grid([v[:12].cpu() for v in views]))
        with cast:
            projections = model.project(views)                           # (V, B, D)
            if byol:                                                     # each view predicts the projection before it
                targets = model.project_by_target(views).roll(1, 0)
                loss = contrastive.byol_loss(model.predict(projections).flatten(0, 1), targets.flatten(0, 1))
            else:
                loss = contrastive.info_nce(gather(projections, 1), settings.temperature, settings.similarity)
        loss.backward()
        stopping = average_gradients(trained, run.stopping)
        run.count(B, (4 if byol else 3) * flops * B, loss)               # BYOL: the target's forward pass, too

        rate = rate_at(step, settings.steps, warmup=settings.steps // 20, decay=1)
        take_step(optimizers, settings.learning_rate * rate)
        if byol:
            model.update_target(1 - (1 - settings.target_rate) * (1 + math.cos(math.pi * step / settings.steps)) / 2)

        run.after(step, stopping, look, dict(loss=2.0 if byol else math.log(V * B - 1)))
    run.done()


if __name__ == "__main__":
    run_script(main)
