"""How fast is the SimCLR step, beside lightly's transform and loss with the same encoder?

    python tests/benchmarks/contrastive.py         a few minutes on two cores
    python tests/benchmarks/contrastive.py --batch 16 --steps 3 --rounds 1 --width 8
                                                   does it run?

A step is two views of each image, forward, loss, backward and optimizer. Both sides have the
same encoder and projection head, batch, size of the views and kinds of augmentation (crop, flip,
colours, grey; no blur), and the same setting of the memory allocator. They take turns in one
process.

    minissl     augmentation of whole batches, info_nce, the optimizers of train_contrastive.py
    lightly     SimCLRTransform on PIL images in two worker processes, NTXentLoss, SGD with
                momentum

Printed besides: which share of our step the augmentation takes, and the floating-point
operations a second (FLOP/s) of our step beside the best rate of a single convolution like those
of the encoder, forward and backward, in the same process.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minissl import contrastive
from minissl.data.batches import generator
from minissl.data.shapes import draw_shapes
from minissl.optim import muon_and_adam, step_optimizers
from minissl.training.machine import (
    WideConvolution,
    autocast_context,
    choose_precision,
    keep_freed_memory,
    matrix_product_rate,
    name_of,
    speed_up_on_cpu,
)


CPU = torch.device("cpu")
TEMPERATURE = 0.15
WARM_UP = 5         # steps of each round that are not counted, until the workers keep up


# ---------------------------------------------------------------- the other side

def import_torchvision():
    """Import torchvision, also where it was built for another torch.

    Its transforms need torch alone. The import fails only because some operators are not
    known, so they get names. Returns the library of these names, or None: they last as long
    as it does.
    """
    try:
        import torchvision  # noqa: F401
        return None
    except RuntimeError:
        for name in list(sys.modules):
            if name.split(".")[0] == "torchvision":
                del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


missing = ""
try:
    library = import_torchvision()
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from PIL import Image
except ImportError as error:
    missing = f"lightly cannot be imported ({error}), so our side is measured alone"


class Pictures(torch.utils.data.Dataset):
    """What lightly's LightlyDataset gives: the transform's views of a PIL image."""

    def __init__(self, images, view):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform = SimCLRTransform(
            input_size=view, cj_strength=0.5, gaussian_blur=0.0, min_scale=0.2
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def their_steps(options, model, images, autocast):
    """A generator that makes a step of lightly's kind each time it is asked."""
    data = Pictures(images, options.view)
    loader = torch.utils.data.DataLoader(data, options.batch, num_workers=2, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.06, momentum=0.9)
    criterion = NTXentLoss(TEMPERATURE)
    for first, second in loader:
        first = first.contiguous(memory_format=torch.contiguous_format)
        second = second.contiguous(memory_format=torch.contiguous_format)
        with autocast:
            z0 = model.project(first[None])[0]                # (B, D)
            z1 = model.project(second[None])[0]
            loss = criterion(z0.float(), z1.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


# ---------------------------------------------------------------- our side

def our_steps(options, model, images, autocast, optimizers, augmenting):
    """A generator that makes a step of train_contrastive.py each time it is asked.

    augmenting: a list that receives the seconds of each step's augmentation.
    """
    B, view = options.batch, (options.view, options.view)
    for step in range(options.steps + WARM_UP):
        begin = time.perf_counter()
        batch = images[step * B:(step + 1) * B]
        views = []
        for _ in range(2):
            numbers = torch.rand(B, 11)
            views.append(contrastive.augment(
                batch, view, numbers, **contrastive.VIEWS_OF_PHOTOGRAPHS))
        views = torch.stack(views)                            # (2, B, C, h, w)
        augmenting.append(time.perf_counter() - begin)
        with autocast:
            loss = contrastive.info_nce(model(views), TEMPERATURE)
        loss.backward()
        step_optimizers(optimizers, lr=0.02)
        yield


def count_flops(model, run):
    """The floating-point operations of the matrix products and convolutions in run().

    The model is in evaluation mode meanwhile, so its batch norms do not move.
    """
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    model.train()
    return counter.get_total_flops()


def flops_of_an_image(options, model):
    """FLOPs of one image in a training step: two views, forward and backward.

    A backward pass has twice the products of a forward pass.
    """
    views = torch.zeros(2, 1, 3, options.view, options.view)

    def forward():
        model(views)

    return 3 * count_flops(model, forward)


def convolution_rate(options, precision, seconds=2.0):
    """FLOP/s of the encoder's second convolution, forward and backward: the best."""
    d, size = 2 * options.width, options.view // 4
    layer = WideConvolution(d, d, 3, padding=1, bias=False)
    layer = layer.to(precision, memory_format=torch.channels_last)
    x = torch.randn(2 * options.batch, d, size, size, dtype=precision)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(layer(x))
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        layer(x).backward(gradient)
        best = min(best, time.perf_counter() - start)
    pixels = x[:, 0].numel()
    multiply_adds = layer.weight.numel() * pixels
    return 3 * 2 * multiply_adds / best


# ---------------------------------------------------------------- the rounds

def seconds_of(steps):
    """The time of a generator's steps, without the first WARM_UP."""
    for _ in range(WARM_UP):
        next(steps)
    begin = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - begin


def new_model(options):
    model = contrastive.SimCLR(torch.full((3,), 0.5), 4 * torch.eye(12), options.width)
    return speed_up_on_cpu(model.to(memory_format=torch.channels_last))


def main(options):
    keep_freed_memory()
    precision, reason = choose_precision(options.precision, CPU)
    autocast = autocast_context(CPU, precision)
    print(missing or "lightly is there")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{name_of(precision)} ({reason})")

    count = options.batch * (options.steps + WARM_UP)
    images, _ = draw_shapes(count, generator(0, "benchmark", 0))
    ours, theirs = new_model(options), new_model(options)
    flops = flops_of_an_image(options, ours)
    optimizers = muon_and_adam(ours, 0.02, 0.02, precision)

    rates = {"minissl": [], "lightly": []}
    augmenting = []
    before = convolution_rate(options, precision)
    for _ in range(options.rounds):
        steps = our_steps(options, ours, images, autocast, optimizers, augmenting)
        rates["minissl"].append(options.batch * options.steps / seconds_of(steps))
        if not missing:
            steps = their_steps(options, theirs, images, autocast)
            rates["lightly"].append(options.batch * options.steps / seconds_of(steps))
    after = convolution_rate(options, precision)

    product = matrix_product_rate(CPU, precision)
    print(f"convolution {before / 1e9:,.0f} GFLOP/s before, {after / 1e9:,.0f} after; "
          f"matrix product {product / 1e9:,.0f}")
    for name, values in rates.items():
        if values:
            share = flops * median(values) / max(before, after)
            print(f"{name}: {median(values):,.0f} images/s "
                  f"({min(values):,.0f} to {max(values):,.0f}), "
                  f"{share:.0%} of the convolution's rate")
    if not missing:
        ratio = median(rates["minissl"]) / median(rates["lightly"])
        pairs = [f"{a / b:.2f}" for a, b in zip(rates["minissl"], rates["lightly"])]
        print(f"ratio {ratio:.2f} (of pairs: {', '.join(pairs)})")
    share = median(augmenting) * median(rates["minissl"]) / options.batch
    print(f"augmentation: {share:.1%} of our step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = dict(rounds=5, steps=8, batch=256, width=64, view=24)
    for flag, default in sizes.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.width) < 1:
        parser.error("--rounds, --steps and --width must be at least 1")
    if options.batch < 2 or options.view < 8:
        parser.error("--batch must be at least 2, and --view at least 8")
    main(options)
