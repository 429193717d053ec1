"""How fast is the SimCLR step, beside lightly's transform and loss with the same encoder?

    python tests/benchmarks/contrastive.py                      a few minutes on two cores
    python tests/benchmarks/contrastive.py --batch 16 --steps 3 --rounds 1 --width 8         does it run?

A step is two views of each image, forward, loss, backward, optimizer. Both sides have the same encoder and projection
head, batch, view size and kinds of augmentation (crop, flip, colour, grey; no blur), and keep_freed_memory(). They take
turns in one process.

    minissl     batched augmentation, info_nce, the optimizers of train_contrastive.py (Muon and AdamW)
    lightly     SimCLRTransform on PIL images in two worker processes, NTXentLoss, SGD with momentum

Printed, too: the share of our step that augmentation takes, and our FLOPs per second beside the best rate of a single
convolution like those of the encoder, forward and backward, in the same process.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minissl import contrastive
from minissl.images import draw_shapes
from minissl.muon import Muon
from minissl.training import autocast, choose_precision, count_flops, generator, keep_freed_memory

WARM_UP = 5       # steps of each round that are not counted: memory is taken, and the workers' first batches lie ready
missing = ""
try:
    try:    # a torchvision built for CUDA imports over a CPU torch if its operators have names
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from PIL import Image
except ImportError as error:
    missing = f"lightly cannot be imported ({error}), so our side is measured alone."


class Pictures(torch.utils.data.Dataset):
    """What lightly's LightlyDataset gives: the transform's views of a PIL image."""

    def __init__(self, images, view):
        self.images, self.transform = (
            [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images],
            SimCLRTransform(input_size=view, cj_strength=0.5, gaussian_blur=0.0, min_scale=0.2))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def convolution_rate(o, precision, seconds=2.0):
    """FLOP/s of the 128-channel convolution, forward and backward: the best."""
    x = torch.randn(2 * o.batch, 2 * o.width, o.view // 4, o.view // 4, dtype=precision).to(
        memory_format=torch.channels_last)
    layer = contrastive.Convolution(2 * o.width, 2 * o.width).to(precision, memory_format=torch.channels_last)
    gradient, best, end = torch.randn_like(layer(x.requires_grad_())), 1e9, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        layer(x).backward(gradient)
        best = min(best, time.perf_counter() - start)
    return 3 * 2 * layer.weight.numel() * x[:, 0].numel() / best


def main(o):
    keep_freed_memory()
    precision, peak, reason = choose_precision(o.precision, torch.device("cpu"))
    cast = autocast(torch.device("cpu"), precision)
    print(missing or "lightly is there", f"torch {torch.__version__}, {torch.get_num_threads()} threads",
          f"{str(precision)[6:]} ({reason})", sep="\n")
    images, _ = draw_shapes(o.batch * (o.steps + WARM_UP), generator(0, "benchmark", 0))
    models = [contrastive.ContrastiveModel(torch.full((3,), 0.5), torch.full((3,), 0.25), width=o.width)
              .to(memory_format=torch.channels_last) for _ in range(2)]
    flops = 3 * count_flops(models[0], lambda: models[0].project(torch.zeros(2, 1, 3, o.view, o.view)))    # an image

    matrices, vectors = ([p for p in models[0].parameters() if (p.ndim > 1) == many] for many in (True, False))
    ours = [Muon(matrices, 0.02, weight_decay=0.02, precision=precision), torch.optim.AdamW(vectors, 0.002, fused=True)]
    augmenting = []

    def our_steps():
        for step in range(o.steps + WARM_UP):
            begin = time.perf_counter()
            batch = images[step * o.batch:(step + 1) * o.batch]
            views = torch.stack([contrastive.augment(batch, (o.view, o.view), torch.rand(o.batch, 12), jitter=0.4,
                                                     hue=0.1, grey=0.2) for _ in range(2)])
            augmenting.append(time.perf_counter() - begin)
            with cast:
                loss = contrastive.info_nce(models[0].project(views), 0.15)
            loss.backward()
            for optimizer in ours:
                optimizer.step()
                optimizer.zero_grad()
            yield

    def their_steps():
        loader = torch.utils.data.DataLoader(Pictures(images, o.view), o.batch, num_workers=2, drop_last=True)
        optimizer, criterion = torch.optim.SGD(models[1].parameters(), 0.06, momentum=0.9), NTXentLoss(0.15)
        for first, second in loader:
            with cast:
                z0, z1 = (models[1].project(view[None].contiguous(memory_format=torch.contiguous_format))[0]
                          for view in (first, second))
                loss = criterion(z0.float(), z1.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    rates, convolution = {"minissl": [], "lightly": []}, [convolution_rate(o, precision)]
    for _ in range(o.rounds):
        for name, steps in (("minissl", our_steps), ("lightly", their_steps)):
            if name == "lightly" and missing:
                continue
            running = steps()
            for _ in range(WARM_UP):
                next(running)
            begin = time.perf_counter()
            for _ in running:
                pass
            rates[name].append(o.batch * o.steps / (time.perf_counter() - begin))
    convolution.append(convolution_rate(o, precision))
    print(f"convolution {convolution[0] / 1e9:,.0f} GFLOP/s before, {convolution[1] / 1e9:,.0f} after; "
          f"matrix product {peak / 1e9:,.0f}")
    for name, r in rates.items():
        if r:
            print(f"{name}: {median(r):,.0f} images/s ({min(r):,.0f} to {max(r):,.0f}), "
                  f"{flops * median(r) / max(convolution):.0%} of the convolution's rate")
    if not missing:
        print(f"ratio {median(rates['minissl']) / median(rates['lightly']):.2f} (of pairs: "
              + ", ".join(f"{a / b:.2f}" for a, b in zip(*rates.values())) + ")")
    print(f"augmentation: {median(augmenting) * median(rates['minissl']) / o.batch:.1%} of our step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in dict(rounds=5, steps=8, batch=256, width=64, view=24).items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.width) < 1 or options.batch < 2 or options.view < 8:
        parser.error("sizes must be at least 1, --batch 2, --view 8")
    main(options)
