"""Pretrain an image encoder without labels.

The method is an autoencoder: it rebuilds each image from a code of 128 numbers.
minissl/autoencoder.py explains the loss and the model.

    python train_ae.py                                        drawn shapes, a few minutes
    python train_ae.py --data cifar10 --run runs/ae-cifar     photographs
    python train_ae.py --masked 0.6 --run runs/ae-masked      with patches cut out
    python train_ae.py --masked 0.6 --targets normalized --run runs/ae-hidden       these alone
    python train_ae.py --data my_images.npy --run runs/ae-mine
                                           your own: uint8 (N, H, W, C) or (N, H, W)
    python train_ae.py --steps 200 --run runs/ae-quick        on a slow laptop
    torchrun --nproc-per-node 2 -- train_ae.py --run runs/ae-two      two processes
    python train_ae.py --run runs/ae-mine --resume            continue a run
    python finetune.py RUN                                    measure whether it helped

`diff train_ae.py train_contrastive.py` shows how the two methods differ.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from minissl import UserError, autoencoder
from minissl.data.batches import Batches, generator
from minissl.data.images import describe, load_images, mean_and_std, mean_and_whitening
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
    run: str = "runs/ae"  # the folder of the run
    resume: bool = False  # continue the run in --run
    steps: int = 600  # optimizer steps
    learning_rate: float = 0.02  # peak rate of matrices and kernels; vectors take a tenth
    width: int = 32  # channels of the first feature map; 64 is better, in nearly 4 times the time
    seed: int = 0  # seed of all random numbers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that torch finds
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one, measured
    compile: bool = False  # torch.compile the model; it takes a minute at the start
    batch_size: int = 256  # images in a step
    code: int = 128  # numbers in the code z
    beta: float = 0.0  # weight of the regularizer, for example 0.01
    regularizer: Literal["none", "sparse", "decorrelated"] = "none"  # desired property of the code
    noise: float = 0.0  # standard deviation of noise on the input, where white is 1
    masked: float = 0.0  # share of the 8 × 8 patches that are cut out of the input
    targets: Literal["pixels", "normalized"] = "pixels"  # normalized: the hidden patches alone
    no_flip: bool = False  # features without the mirror image: for digits, letters and the like
    evaluate_every: int = 200  # steps between two previews
    save_every: float = 30  # seconds between two checkpoints

    def __post_init__(self):
        require_at_least(self, 1, "steps", "width", "evaluate_every")
        require_at_least(self, 0, "limit", "save_every")
        require_at_least(self, 2, "batch_size", "code")
        require_at_least(self, 0, "beta", "noise", "masked")
        require_above(self, 0, "learning_rate")
        require_at_most(self, 0.95, "masked")       # something must be left to rebuild from
        if self.targets == "normalized" and not self.masked:
            raise UserError(
                "--targets normalized: these are the patches that --masked cuts out; "
                "give --masked, for example 0.6"
            )
        has_regularizer = self.regularizer != "none"
        if has_regularizer != (self.beta > 0):
            raise UserError(
                f"--beta {self.beta} and --regularizer {self.regularizer} do not fit: "
                f"give both or neither"
            )


# ---------------------------------------------------------------- The loss

def compute_loss(model, images, corrupted, hidden, settings):
    """Rebuild the images, or their hidden patches, from what the encoder gets of them.

    Returns the loss to minimize, and the losses for the log.
    """
    rebuilt, codes = model(corrupted)                                     # (B, C, H, W), (B, D)
    codes = all_gather(codes)               # a covariance needs the codes of the whole batch
    target, counted = images, None                                        # all pixels count
    if settings.targets == "normalized":
        target, _, _ = autoencoder.normalize_patches(images)
        counted = hidden
    loss, error, penalty = autoencoder.autoencoder_loss(
        target, rebuilt, codes, settings.beta, settings.regularizer, counted
    )
    losses = dict(squared_error=error)
    if settings.beta > 0:
        losses["regularizer"] = penalty
    return loss, losses


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
    if settings.masked and max(H, W) <= autoencoder.PATCH:
        raise UserError(
            f"--masked {settings.masked}: images of {H} × {W} have a single patch; leave out "
            f"--masked, or enlarge the images"
        )

    B = settings.batch_size
    batches = Batches(N, B, settings.seed, "image order")

    def corrupt(images, step):
        """The images with noise or with patches cut out, and where these were."""
        draws = generator(settings.seed, "corruption", step)
        return autoencoder.corrupt(images, settings.noise, settings.masked, generator=draws)

    # ------------------------------------------------------------ Model

    # The arguments of the model go into the checkpoint, so that finetune.py can build it.
    torch.manual_seed(settings.seed)
    statistics = mean_and_std(train_images) | mean_and_whitening(train_images)
    model_settings = dict(
        size=[H, W], code=settings.code, width=settings.width, targets=settings.targets,
        **statistics,
    )
    model = autoencoder.Autoencoder(**model_settings)
    # Batch norm takes its statistics from the batches of all processes.
    model = move_to_device(sync_batch_norm(model), device)
    # Muon trains matrices and kernels, Adam trains vectors: see minissl/optim.py.
    optimizers = muon_and_adam(
        model, settings.learning_rate, weight_decay=0.02, precision=precision
    )

    def learning_rate(step):
        """It rises for a twentieth of the steps, then falls linearly to 0."""
        warmup = settings.steps // 20
        return settings.learning_rate * lr_schedule(step, settings.steps, warmup, decay=1)

    # ------------------------------------------------------------ Run

    preview = previews.AutoencoderPreview(
        data, corrupt, run.folder, autocast, device,
        targets=settings.targets,
        mirror=not settings.no_flip,
    )
    chance = dict(squared_error=preview.chance(), regularizer=None)
    # This makes the folder of the run. A resumed run loads its checkpoint here.
    first_step = run.begin(
        model,
        optimizers,
        data=describe(data),
        method="autoencoder",
        model_settings=model_settings,
        chance=chance,
        preview=preview,
    )
    if settings.compile:
        model.compile()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model: {parameters:,} parameters")

    # ------------------------------------------------------------ Training

    # Everything random in a step is a function of the seed and the step. Of each batch,
    # every process takes its share; a single process takes all of it.
    for step in range(first_step, settings.steps):
        images = train_images[batches(step)].to(device).float() / 255     # (B, C, H, W)
        corrupted, hidden = corrupt(images, step)       # with the mean colour of the whole batch
        images, corrupted, hidden = shard(images, corrupted, hidden)      # this process's share
        with autocast:
            loss, losses = compute_loss(model, images, corrupted, hidden, settings)
        loss.backward()
        average_gradients(model)
        step_optimizers(optimizers, learning_rate(step))
        run.end_step(step, losses, items=len(images))
    run.finish()


if __name__ == "__main__":
    run_script(main)
