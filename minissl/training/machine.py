"""The machine: which device, which precision, and what makes a CPU faster.

Nothing here changes the formulas. It chooses where and in which precision they are
computed, and it swaps a few layers for others that are equal up to rounding. The
measurements behind most of the choices are in EXPERIMENTS.md, section "Speed".
"""

import contextlib
import ctypes
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minissl import UserError, contrastive, transformer
from minissl.training import distributed


class Machine(NamedTuple):
    """Where and how a script computes."""
    device: torch.device
    precision: torch.dtype      # float32 or bfloat16
    autocast: object            # a context for forward passes


def choose_machine(settings):
    """The Machine for settings.device and settings.precision.

    Prints both choices with their reasons. The chosen precision is also written into
    settings, so that a resumed run keeps it. Several processes meet here.
    """
    device, reason = choose_device(settings.device)
    device = distributed.join(device)
    if distributed.WORLD_SIZE > 1:
        reason += f", {distributed.WORLD_SIZE} processes"
    print(f"device: {device} ({reason})")
    if device.type == "cpu":
        keep_freed_memory()
    choice = choose_precision(settings.precision, device)
    precision, reason = distributed.broadcast(choice)
    settings.precision = name_of(precision)
    print(f"precision: {settings.precision} ({reason})")
    return Machine(device, precision, autocast_context(device, precision))


def name_of(dtype):
    """
    >>> name_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- device

def choose_device(name):
    """The device for "auto", "cpu", "cuda" or "mps", and the reason in words.

    "auto" takes CUDA if there is one, else MPS, else the CPU. Raises UserError if torch
    does not find the device that was asked for.
    """
    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available() and distributed.WORLD_SIZE == 1:
        available.append("mps")         # torch has no collective operations on MPS
    available.append("cpu")
    if name == "auto":
        if available == ["cpu"]:
            return torch.device("cpu"), f"no GPU found; {torch.get_num_threads()} threads"
        return torch.device(available[0]), "found"
    if name == "mps" and distributed.WORLD_SIZE > 1:
        raise UserError("--device mps: several processes cannot share it; give --device cpu")
    if name not in available:
        raise UserError(
            f"--device {name}: torch does not find this device here; "
            f"available: {', '.join(available)}"
        )
    return torch.device(name), "as requested"


# ---------------------------------------------------------------- precision

def choose_precision(name, device):
    """The dtype for "auto", "float32" or "bfloat16", and the reason in words.

    "auto" takes bfloat16 if a large matrix product is more than 1.3 times as fast in it.
    A CPU without bfloat16 units emulates it a hundred times slower, so this is measured.
    """
    if name == "bfloat16" and not torch.amp.autocast_mode.is_autocast_available(device.type):
        raise UserError(
            f"--precision bfloat16: torch {torch.__version__} cannot use it on {device.type}; "
            f"leave it out, or install a newer torch (a run can only be resumed in the "
            f"precision in which it began)"
        )
    if name != "auto":
        return getattr(torch, name), "as requested, or as the run began"
    if device.type == "mps":
        return torch.float32, "the default on MPS"
    rate_32 = matrix_product_rate(device, torch.float32, 256, seconds=0.02)
    rate_16 = matrix_product_rate(device, torch.bfloat16, 256, seconds=0.02)
    rates = {torch.float32: matrix_product_rate(device, torch.float32)}
    if rate_16 > 0.5 * rate_32:         # else it is emulated; measure it no further
        rates[torch.bfloat16] = matrix_product_rate(device, torch.bfloat16)
    gain = rates.get(torch.bfloat16, 0) / rates[torch.float32]
    measured = []
    for dtype, rate in rates.items():
        measured.append(f"{name_of(dtype)} {rate / 1e9:,.0f} GFLOP/s")
    chosen = torch.bfloat16 if gain > 1.3 else torch.float32
    return chosen, "measured: " + ", ".join(measured)


def matrix_product_rate(device, dtype, n=1536, seconds=0.3):
    """FLOP/s of an (n, n) matrix product, the fastest of those that fit in the time."""
    a = torch.ones(n, n, device=device, dtype=dtype)
    b = torch.ones(n, n, device=device, dtype=dtype)
    a @ b                               # the first call also prepares the kernel
    best = math.inf
    end = time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()            # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def autocast_context(device, precision):
    """A context for forward passes in bfloat16, or one that does nothing for float32."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


# ---------------------------------------------------------------- faster, equal up to rounding

def move_to_device(model, device):
    """The model on the device, with the memory order and the layers that are fastest there.

    Convolutions are faster with the channels last in memory. MPS is the exception: there
    batch norm computes wrong gradients for this order (pytorch issue 175189).
    """
    if device.type == "mps":
        return model.to(device)
    return speed_up_on_cpu(model.to(device, memory_format=torch.channels_last))


def keep_freed_memory():
    """Tell glibc to keep freed memory instead of returning it to the system.

    Otherwise every large tensor is returned, and the next step pays a page fault for
    each 4 kB of it: 4,600 instead of 6,500 tokens a second in float32. With another C
    library nothing happens.
    """
    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
        accepted = mallopt(M_MMAP_THRESHOLD, 2**30)
        if not accepted:                # an older glibc accepts at most 32 MB
            mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError, TypeError):
        pass


def speed_up_on_cpu(model):
    """Replace layers by equivalent ones that are faster in bfloat16 on a CPU.

    Changes the model in place and returns it. On other devices and in float32 the
    replaced layers do what they did before. Parameters and their names stay.
    """
    for module in model.modules():
        if isinstance(module, transformer.Attention):
            module.__class__ = AttentionByHand
        # The autoencoder's convolutions stay as they are: the gain was too noisy to tell
        # (EXPERIMENTS.md, "Why is the gradient of a convolution's weights slow?").
        if isinstance(module, contrastive.ImageEncoder):
            for layer in module.modules():
                if type(layer) is nn.Conv2d and is_3x3(layer):
                    layer.__class__ = WideConvolution
    return model


def is_3x3(layer):
    """Whether a Conv2d has a kernel of 3 × 3 and a padding of one pixel."""
    return layer.kernel_size == (3, 3) and layer.padding == (1, 1)


def is_bfloat16_on_cpu(x):
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


class AttentionByHand(transformer.Attention):
    """Attention with its formula written out: softmax(q kᵀ / √(D/H)) v.

    In bfloat16 on a CPU, the backward pass of scaled_dot_product_attention takes 40 % of
    the whole step. By hand it is 21,200 tokens a second instead of 12,800 (6 layers).
    """

    def attend(self, q, k, v, visible):
        if not is_bfloat16_on_cpu(q):
            return super().attend(q, k, v, visible)
        scale = q.shape[-1] ** -0.5
        score = q * scale @ k.transpose(-1, -2)               # (B, H, T, T)
        if visible is not None:
            score = score.masked_fill(~visible, float("-inf"))
        return score.softmax(-1) @ v                          # (B, H, T, D/H)


class WideConvolution(nn.Conv2d):
    """A 3 × 3 convolution, padded with one zero, of stride 1 or 2, that lays images side by side.

    In bfloat16 on a CPU, torch computes the gradient of the weights image by image, which is
    slow (EXPERIMENTS.md, "Why is the gradient of a convolution's weights slow?"). Here the images
    of a batch become a few wide images with zeros in between, so the sums are the same:

        . a a a . b b b . c c c .          three images of width 3 and their zeros

    The whole SimCLR step makes 1,443 images a second instead of 694.
    """

    def forward(self, x):
        """x (B, C, H, W) -> (B, C', ⌈H / stride⌉, ⌈W / stride⌉)"""
        if not is_bfloat16_on_cpu(x):
            return super().forward(x)
        B, C, H, W = x.shape
        stride = self.stride[0]
        # One or two columns of zeros follow each image. Then its padded width is a multiple of
        # the stride, and each image has padded // stride columns of the output.
        padded = W + stride - W % stride
        wide = math.gcd(B, 8)                                 # the number of wide images
        x = F.pad(x, (0, padded - W)).permute(0, 2, 3, 1)     # (B, H, padded, C)
        x = x.reshape(wide, B // wide, H, padded, C)
        x = x.transpose(1, 2)                                 # (wide, H, B/wide, padded, C)
        x = x.flatten(2, 3).permute(0, 3, 1, 2)               # (wide, C, H, B/wide · padded)
        y = super().forward(x)
        y = y.permute(0, 2, 3, 1)                             # (wide, H', ..., C')
        y = y.unflatten(2, (B // wide, padded // stride))
        y = y.transpose(1, 2)                                 # (wide, B/wide, H', ..., C')
        own_width = math.ceil(W / stride)                     # the other columns come from zeros
        y = y[:, :, :, :own_width].flatten(0, 1)              # (B, H', W', C')
        return y.permute(0, 3, 1, 2)
