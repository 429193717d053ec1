"""Several processes that together take the steps of one.

    torchrun --nproc-per-node 4 -- train_contrastive.py --run runs/four                    one machine
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -- train_ae.py  on each of two

(The -- keeps torchrun from taking --run for an option of its own.)

Each process draws what one process would draw and takes its slice of the batch; what a loss needs of the other
slices it gets by `sum_over` or `gather`, with gradient; before the optimizer's step the gradients are averaged. So N
processes make the step of one with the whole batch, and all hold the same weights ever after, without sending them.

The trap: a collective whose value is right and whose gradient is not. A gather that returns the others' part as
constants gives each process 1/N of the gradient that its slice has in the other processes' losses. Adam hides the
factor; the tests compare gradients, with different data in each process.

torch's DistributedDataParallel does the same averaging, but only for models that are entered by `forward` alone, and
its SyncBatchNorm refuses CPU tensors. With one process every function here does nothing.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from minissl import UserError


RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get(name, default)) for name, default in (      # torchrun's
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))          # local: of this machine


def join(device):
    """Meet the other processes. -> this one's device; all but the first fall silent."""
    if WORLD == 1:
        return device
    if device.type == "cuda":
        if LOCAL_WORLD > torch.cuda.device_count():
            raise UserError(f"--nproc-per-node {LOCAL_WORLD}: each process takes a GPU, and this machine has "
                            f"{torch.cuda.device_count()}; start so many, or give --device cpu")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def lost(error):
    """Does this RuntimeError mean that another process is gone?"""
    return WORLD > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error))


def agree(value):
    """The first process's value, in all processes."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def first_alone():
    """The first process goes through the block, then the others: they find its download and its cache."""
    if WORLD > 1 and RANK:
        dist.barrier()
    yield
    if WORLD > 1 and not RANK:
        dist.barrier()


def share(batch):
    """This process's slice of a batch (B, ...); training.Batches sees to it that B is a multiple of WORLD."""
    return batch.chunk(WORLD)[RANK]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient):       # each process's x is in every process's sum: all their gradients arrive
        return _Sum.apply(gradient)


def sum_over(x):
    """The sum of x over all processes, of x's shape, with gradient."""
    return x if WORLD == 1 else _Sum.apply(x)


def gather(x, dim=0):
    """The x of all processes one behind the other along `dim`, in order, with gradient: (b, D) -> (WORLD · b, D).

    Views (V, b, D) along dim 1, here of two images a process:

        process 0   view 0  a b     view 1  a b
        process 1   view 0  c d     view 1  c d         both then have   view 0  a b c d     view 1  a b c d

    as one process with all four images would. Along dim 0 it would be four views, a b, a b, c d, c d, and InfoNCE would
    take c for a view of a: no error, only an encoder that learns to see no difference.
    """
    if WORLD == 1:
        return x
    parts = [torch.zeros_like(x)] * RANK + [x] + [torch.zeros_like(x)] * (WORLD - 1 - RANK)
    return sum_over(torch.stack(parts)).movedim(0, dim).flatten(dim, dim + 1)


def average_gradients(parameters, stopping=False):
    """Replace each parameter's gradient by its mean over the processes. -> whether any process is `stopping`."""
    if WORLD == 1:
        return stopping
    parameters = list(parameters)
    said = [float(stopping)] + [float(p.grad is not None) for p in parameters]
    said = torch.tensor(said, device=parameters[0].device, dtype=parameters[0].dtype)
    flat = torch.cat([said] + [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    (stopping, *there), flat = flat[:len(said)].tolist(), flat[len(said):] / WORLD
    for p, has, gradient in zip(parameters, there, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p).clone(memory_format=torch.preserve_format) if has else None
    return stopping > 0


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose mean and variance are those of all processes' batches together."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        y = x if x.dtype == torch.float64 else x.float()
        n = sum_over(torch.full((1,), float(x.numel() // x.shape[1]), device=x.device, dtype=y.dtype))
        mean = sum_over(y.sum(axes)) / n                                      # (C,)
        centred = y - mean.view(shape)
        variance = sum_over(centred.square().sum(axes)) / n                   # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y).to(x.dtype)


def share_batch_norm(model):
    """Replace every batch norm inside the model by one over all processes; names and values stay."""
    if WORLD > 1:
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.__class__ = SharedBatchNorm
    return model
