"""Several processes that together take the step of one.

    torchrun --nproc-per-node 4 -- train_contrastive.py --run runs/four
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d \\
             --rdzv-endpoint HOST:29400 -- train_ae.py       (on each of two machines)

The `--` keeps torchrun from reading `--run` as an option of its own. Several machines need
the folders of --data-dir and --run on a disk that all of them see.

How it works: every process draws the random numbers of the whole batch and takes its
share of them (`shard`). What a loss needs of the other processes' shares comes by
`all_gather` or `all_reduce`, with gradient. Before the optimizer's step the gradients
are averaged. So N processes make the step of one process with the whole batch, and
their weights stay equal without being sent.

The trap: a collective operation with the right value and the wrong gradient. If a
gather returns the other processes' part as constants, each process computes only 1/N
of the gradient that its share has in the others' losses. Adam hides the factor. The
tests therefore compare gradients, with different data in each process.

With a single process nothing is sent: `shard` gives the whole batch, and sums and means are
the values themselves.

torch has DistributedDataParallel and SyncBatchNorm for this. The first averages gradients
only if a model is called as model(x), and ours are also called by other methods. The second
refuses tensors on the CPU.
"""

import contextlib
import os
import signal
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from minissl import UserError
from minissl.training.wording import count_of


# ---------------------------------------------------------------- torchrun's variables

VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]


def read_environment(environment):
    """-> [rank, world size, local rank, local world size], as torchrun has set them.

    Local means: on this machine. Raises UserError if the variables are incomplete or
    contradict each other, because a process that waits for others forever says nothing.
    """
    world_size = environment.get("WORLD_SIZE")
    if not world_size:
        return [0, 1, 0, 1]
    if not world_size.isdecimal():
        raise UserError(
            f"WORLD_SIZE={world_size} in the environment is not a number of processes: start "
            f"the script with torchrun, or unset WORLD_SIZE"
        )
    values = []
    for name in VARIABLES:
        value = environment.get(name, "")
        if not value.isdecimal():
            raise does_not_fit(environment, name)
        values.append(int(value))
    rank, world_size, _, _ = values
    if world_size > 1:
        if not environment.get("MASTER_ADDR"):
            raise does_not_fit(environment, "MASTER_ADDR")
        port = environment.get("MASTER_PORT", "")
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            raise does_not_fit(environment, "MASTER_PORT")
    if rank >= world_size:
        raise UserError(
            f"RANK={rank} in the environment does not fit WORLD_SIZE={world_size}: "
            f"start the script with torchrun, or unset both"
        )
    return values


def does_not_fit(environment, name):
    """The error for a variable that is missing, or has a value that cannot be right."""
    value = environment.get(name)
    shown = repr(value) if value else "not set"
    return UserError(
        f"WORLD_SIZE={environment['WORLD_SIZE']} is set in the environment, but {name} is "
        f"{shown}: start the script with torchrun, or unset WORLD_SIZE"
    )


try:
    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = read_environment(os.environ)
    ENVIRONMENT_ERROR = None
except UserError as error:              # an import must not fail; `join` raises it
    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = 0, 1, 0, 1
    ENVIRONMENT_ERROR = error


def is_under_torchrun():
    """Whether torchrun has started this process. Variables may also be left over."""
    return bool(os.environ.get("TORCHELASTIC_RUN_ID"))


def is_silent():
    """Whether another process on this machine says what all of them would say.

    A number that is left over in LOCAL_RANK does not mean that there is another process.
    """
    has_others = WORLD_SIZE > 1 and (dist.is_initialized() or is_under_torchrun())
    return LOCAL_RANK > 0 and has_others


# ---------------------------------------------------------------- beginning and end

def join(device):
    """Meet the other processes. Returns this process's device.

    All processes but the first stop printing to standard output.
    """
    if ENVIRONMENT_ERROR:
        raise ENVIRONMENT_ERROR
    if WORLD_SIZE == 1:
        return device
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if LOCAL_WORLD_SIZE > gpus:
            raise UserError(
                f"--nproc-per-node {LOCAL_WORLD_SIZE}: this machine has {gpus} GPUs, and "
                f"each process needs one; start fewer processes, or give --device cpu"
            )
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if not is_under_torchrun():
            say_what_it_waits_for()
        with ctrl_c_ends_at_once():
            # The others wait while the first process encodes a large corpus.
            timeout = timedelta(hours=2)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


@contextlib.contextmanager
def ctrl_c_ends_at_once():
    """Let the system itself handle Ctrl-C in the block.

    While torch waits for other processes, Python does not get to see the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say_what_it_waits_for():
    """Print on stderr that other processes have to come. If none does, this one hangs."""
    others = count_of(WORLD_SIZE - 1, "other process", "other processes")
    print(
        f"waiting for {others}, because WORLD_SIZE={WORLD_SIZE} is set; "
        f"if you did not use torchrun, press Ctrl-C and unset WORLD_SIZE",
        file=sys.stderr, flush=True,
    )


def leave():
    """Close the connections to the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_successfully():
    """End this process with exit code 0, if it is one of several.

    The threads of torch's gloo sometimes abort a process while Python is ending, after all
    work is done. torchrun would take this for a failure and end the other processes.
    """
    if WORLD_SIZE > 1:
        leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_connection_error(error):
    """Whether this RuntimeError means that another process has ended."""
    if WORLD_SIZE == 1:
        return False
    message = str(error)
    return isinstance(error, dist.DistError) or "gloo" in message or "Connection" in message


@contextlib.contextmanager
def main_process_first():
    """The first process runs the block alone, then the others do.

    So one process downloads the data and fills the cache, and the others find both.
    """
    if WORLD_SIZE > 1 and RANK > 0:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and RANK == 0:
        dist.barrier()


def broadcast(value):
    """The first process's value, in all processes. The value may be any object."""
    box = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


# ---------------------------------------------------------------- the batch and its losses

def shard(*tensors):
    """This process's rows of each tensor (B, ...).

    The rows are dealt out in order, and as equally as possible:

    >>> shard(torch.arange(3), torch.ones(3, 2))[0]         # one process takes them all
    tensor([0, 1, 2])
    """
    return [tensor.tensor_split(WORLD_SIZE)[RANK] for tensor in tensors]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient):
        # Each process's x is in every process's sum, so it receives all their gradients.
        return _Sum.apply(gradient)


def all_reduce(x):
    """The sum of x over all processes, with the shape of x, with gradient."""
    return x if WORLD_SIZE == 1 else _Sum.apply(x)


def average_over_processes(x):
    """The mean of x over all processes, with the shape of x, with gradient.

    A loss that is a sum divided by a count needs this for its count: each process
    divides its own sum by the average count, then the mean of these quotients over
    the processes is the sum of all divided by the count of all.
    """
    return all_reduce(x) / WORLD_SIZE


def all_gather(x, dim=0):
    """The x of all processes, joined along `dim` in order, with gradient.

    x (b, D) becomes (N · b, D) for N processes. Its shape must be the same in all of
    them. Views (V, b, D) are joined along dim 1. Here is an example with two views and
    two images for each process:

        process 0   view 0  a b     view 1  a b
        process 1   view 0  c d     view 1  c d
        both then have              view 0  a b c d     view 1  a b c d

    One process with all four images would have the same. Joined along dim 0, they
    would be four views: a b, a b, c d, c d. InfoNCE would then take c for a view of a,
    and the encoder would learn to see no difference. No error would be raised.
    """
    if WORLD_SIZE == 1:
        return x
    parts = [torch.zeros_like(x) for _ in range(WORLD_SIZE)]
    parts[RANK] = x
    return all_reduce(torch.stack(parts)).movedim(0, dim).flatten(dim, dim + 1)


def average_gradients(model):
    """Replace the gradient of each trained parameter by its mean over the processes."""
    if WORLD_SIZE == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A parameter that no process used keeps None; one that some used counts 0 elsewhere.
    used = torch.tensor([float(p.grad is not None) for p in parameters])
    gradients = []
    for p in parameters:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        gradients.append(gradient.flatten())
    flat = torch.cat([used.to(gradients[0]), *gradients])
    dist.all_reduce(flat)
    used, flat = flat[:len(parameters)].tolist(), flat[len(parameters):] / WORLD_SIZE
    pieces = flat.split([p.numel() for p in parameters])
    for p, count, piece in zip(parameters, used, pieces):
        if count == 0:
            p.grad = None
        else:
            p.grad = piece.view_as(p).clone(memory_format=torch.preserve_format)


# ---------------------------------------------------------------- batch norm

class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the mean and variance of all processes' batches together."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        """x (B, C) or (B, C, H, W) -> the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1] * x.ndim
        shape[1] = -1                                 # (1, -1) or (1, -1, 1, 1)
        y = x if x.dtype == torch.float64 else x.float()
        count = torch.full((1,), float(x.numel() // x.shape[1]))
        n = all_reduce(count.to(y))
        mean = all_reduce(y.sum(axes)) / n                            # (C,)
        centred = y - mean.view(shape)
        variance = all_reduce(centred.square().sum(axes)) / n         # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def sync_batch_norm(model):
    """Let every batch norm of the model see the batches of all processes.

    Changes the model in place and returns it. Names and values of its parameters stay.
    """
    if WORLD_SIZE > 1:
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.__class__ = SyncBatchNorm
    return model
