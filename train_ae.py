"""Pretrain an image encoder without labels: rebuild images from a code of 128 numbers (an autoencoder).

    python train_ae.py                                          shapes that our own code draws, a few minutes
    python train_ae.py --data cifar10 --run runs/ae-cifar --width 64 --steps 600
    python train_ae.py --masked 0.6 --run runs/ae-masked        with patches cut out
    python train_ae.py --data my_images.npy --run runs/mine     your own: uint8 (N, H, W, C) or (N, H, W)
    python train_ae.py --steps 200 --run runs/quick             a slow laptop: a third of the time
    torchrun --nproc-per-node 2 -- train_ae.py                  several processes that make the step of one
    python train_ae.py --run runs/mine --resume                 go on where Ctrl-C stopped
    python finetune.py runs/ae                                  what was it worth? a table

Read it beside its sibling: `diff train_ae.py train_contrastive.py` prints the method and little else.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from minissl import UserError, autoencoder, evaluation, figures
from minissl.datasets import HELD_OUT, TRAIN
from minissl.images import describe, load_images, mean_and_deviation
from minissl.muon import Muon
from minissl.processes import average_gradients, first_alone, gather, share, share_batch_norm
from minissl.training import (Batches, Run, at_least, choose_machine, count_flops, generator, rate_at, read_settings,
                              run_script, take_step)


# ---------------------------------------------------------------- Settings

@dataclass
class Settings:
    data: str = "shapes"  # shapes, cifar10, or a .npy of uint8 images (N, H, W, C) or (N, H, W)
    data_dir: str = "data"  # where archives lie
    limit: int = 0  # take this many images of each split only, for a trial; 0: all
    run: str = "runs/ae"  # the run's folder
    resume: bool = False  # go on with the run in --run
    steps: int = 600  # optimizer steps
    batch_size: int = 256  # images a step; no gradient accumulation: batch norm would not see the rest
    learning_rate: float = 0.02  # Muon's, on matrices and kernels; Adam's on vectors is a tenth
    width: int = 32  # of the encoder's first feature map, doubled twice; 64 sees more, in nearly four times the time
    seed: int = 0  # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is measurably faster
    compile: bool = False  # torch.compile the model: a minute first; meant for a GPU, not measured
    code: int = 128  # numbers in z
    beta: float = 0.0  # weight of the regularizer, such as 0.01: both or neither
    regularizer: Literal["none", "sparse", "decorrelated"] = "none"  # what R(z) asks for
    noise: float = 0.0  # deviation of Gaussian noise on the input, in units of white: a denoising autoencoder
    masked: float = 0.0  # share of 8 × 8 patches cut out of the input
    evaluate_every: int = 200  # steps
    save_every: float = 30  # seconds; a run that is killed loses no more

    def __post_init__(self):
        at_least(self, 1, "steps", "width", "evaluate_every")
        at_least(self, 2, "batch_size", "code")
        at_least(self, 0, "limit", "beta", "noise", "masked")
        at_least(self, 1e-9, "learning_rate")
        if self.masked > 0.95:
            raise UserError(f"--masked {self.masked}: must be at most 0.95, or there is nothing to rebuild from")
        if bool(self.beta) != (self.regularizer != "none"):
            raise UserError(f"--beta {self.beta} with --regularizer {self.regularizer}: give both or neither")


# ---------------------------------------------------------------- What it has learned so far

class Look:
    """Called with the model: what the loss does not show, on held-out images; pictures of it in the run's folder."""

    def __init__(self, data, folder, corrupt, cast, device):
        self.folder, self.cast = folder, cast
        self.images = data.of(HELD_OUT, 512)[:].to(device).float() / 255                     # (B, C, H, W)
        self.given = corrupt(self.images, "look")
        self.neighbours = evaluation.Neighbours(data, device)

    @torch.no_grad()
    def __call__(self, model):
        with self.cast:
            rebuilt, z = model(self.given)
            start, end = z[:8].float(), z.roll(1, 0)[:8].float()
            walks = [model.decode(start.lerp(end, step / 7)) for step in range(8)]               # 8 × (8, C, H, W)
        rows = [self.images[:12], rebuilt[:12]]
        if not torch.equal(self.images, self.given):
            rows.insert(1, self.given[:12])
        figures.write_png(self.folder / "reconstructions.png", figures.grid([row.float().cpu() for row in rows]))
        figures.write_png(self.folder / "walks.png", figures.grid(list(torch.stack(walks, 1).float().cpu())))
        accuracy = self.neighbours(model.encode, self.cast, self.folder)
        _, error, _ = autoencoder.autoencoder_loss(self.images, rebuilt, z)
        return dict(held_out=round(float(error), 5), sparsity=round(float(autoencoder.sparsity(z.float())), 4),
                    correlation=round(float(autoencoder.correlation(z.float())), 4), knn=accuracy)


# ---------------------------------------------------------------- Training

def main():
    settings = read_settings(Settings, __doc__)
    run = Run(settings)
    device, precision, cast, peak = choose_machine(settings)
    with first_alone():
        data = load_images(settings.data, settings.data_dir, settings.limit)
    pool = data.of(TRAIN).to(device)                                     # N images (C, H, W) uint8
    B, (C, H, W) = settings.batch_size, pool.shape[1:]
    print(f"data: {settings.data}, {len(pool):,} images of {H} × {W} × {C} to learn from"
          + "".join(f"; {note}" for note in data.notes))
    if settings.masked and max(H, W) <= 8:
        raise UserError(f"--masked {settings.masked}: the images are one patch of 8 × 8; leave it out, or enlarge them")
    batches = Batches(len(pool), B, settings.seed, "image order")

    def corrupt(images, step):
        return autoencoder.corrupt(images, settings.noise, settings.masked,
                                   generator=generator(settings.seed, "corruption", step))

    torch.manual_seed(settings.seed)
    shape = dict(size=[H, W], code=settings.code, width=settings.width, **mean_and_deviation(pool))
    model = autoencoder.Autoencoder(**shape).to(device, memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    optimizers = [Muon(matrices, settings.learning_rate, weight_decay=0.02, precision=precision),
                  torch.optim.Adam([dict(params=vectors, times=0.1)], fused=device.type != "mps")]
    first = run.begin(share_batch_norm(model), optimizers, peak, describe(data),
                      method="autoencoder", model_settings=shape)
    look = Look(data, run.folder, corrupt, cast, device)
    chance = float((look.images - look.images.mean(0)).square().mean())   # the error of the mean image
    flops = count_flops(model, lambda: model(torch.zeros(1, C, H, W, device=device)))   # of an image, forward
    if settings.compile:
        model.compile()
    print(f"model: {sum(p.numel() for p in trained):,} parameters, {flops / 2e6:,.0f} million multiply-adds an image")

    for step in range(first, settings.steps):
        images = pool[batches(step)].to(device).float() / 255            # (B, C, H, W)
        images, given = share(images), share(corrupt(images, step))      # of several processes, a slice each
        with cast:
            rebuilt, z = model(given)                                    # (B, C, H, W), (B, D)
            loss, error, penalty = autoencoder.autoencoder_loss(images, rebuilt, gather(z),
                                                                settings.beta, settings.regularizer)
        loss.backward()
        stopping = average_gradients(trained, run.stopping)
        run.count(B, 3 * flops * B, error, penalty)

        rate = rate_at(step, settings.steps, warmup=settings.steps // 20, decay=1)
        take_step(optimizers, settings.learning_rate * rate)

        run.after(step, stopping, look, dict(squared_error=chance, regularizer=None))
    run.done()


if __name__ == "__main__":
    run_script(main)
