"""N processes against one; test_distributed.py starts this file in each of N processes.

Each task calls the loss of its training script: first as the only process, with the whole
batch, then as one of N, with its share of the batch. The mean loss, the gradients and the
running statistics of batch norm must be the same. The gradients are compared as they are,
because Adam would hide a factor.
"""

import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_ae  # noqa: E402
import train_contrastive  # noqa: E402
import train_mlm  # noqa: E402
from minissl import autoencoder, contrastive, transformer  # noqa: E402
from minissl.training import distributed  # noqa: E402
from minissl.training.distributed import shard  # noqa: E402


V = 30            # words of the text model; it has no word pairs
SETTINGS = SimpleNamespace(
    temperature=0.2,
    similarity="cosine",
    beta=0.5,
    regularizer="decorrelated",
    targets="pixels",
    masked_weight=1.5,
    document_weight=4.0,
)


# ---------------------------------------------------------------- the tasks: (loss, its terms)

def simclr(model, views):
    first, second = shard(*views)
    return train_contrastive.simclr_loss(model, torch.stack([first, second]), SETTINGS)


def byol(model, views):
    first, second = shard(*views)
    return train_contrastive.byol_loss(model, torch.stack([first, second]), SETTINGS)


def decorrelated_codes(model, views):
    images, corrupted = shard(*views)
    return train_ae.compute_loss(model, images, corrupted, None, SETTINGS)


def whole_texts(model, batch):
    read, rest = shard(*batch)
    return train_mlm.document_loss_of_whole_texts(model, read, rest)


def windows(model, batch):
    inputs, targets, lengths, rest = shard(*batch)
    return train_mlm.masked_and_document_loss(
        model, inputs, targets, lengths, rest, SETTINGS, nullcontext()
    )


# ---------------------------------------------------------------- their data and models

LENGTHS = torch.tensor([12, 3, 7, 12, 1, 9, 12, 5])


def random_tokens(rows, columns):
    return torch.randint(2, V, (rows, columns))


def whole_text_batch():
    """What is read and what is not, of eight texts. One has nothing to predict."""
    tokens = random_tokens(8, 20)
    is_read = torch.rand(8, 20) < 0.5
    is_read[2] = True
    return tokens.masked_fill(~is_read, 0), tokens.masked_fill(is_read, 0)


def window_batch(size):
    """Windows of unequal lengths, so that every process has another number of masks."""
    lengths = LENGTHS[:size]
    tokens = random_tokens(size, int(lengths.max()))
    is_padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    tokens = tokens.masked_fill(is_padding, 0)
    inputs, targets = transformer.mask_tokens(tokens, lengths, V, 0.3)
    rest = random_tokens(size, 15)
    rest[2:3] = 0                                    # the third document has nothing left
    return inputs, targets, lengths, rest


def image_model(cls, *size, **options):
    statistics = dict(mean=torch.zeros(3), whitening=torch.eye(12))
    if not issubclass(cls, contrastive.SimCLR):
        statistics["std"] = torch.ones(3)
    return cls(*size, **statistics, width=4, **options).double()


def text_model():
    no_pairs = torch.empty(0, dtype=torch.int64)
    return transformer.TextEncoder(V, no_pairs, 16, 1, 2, 12, 16)


def randomize(model):
    """Give every parameter a random value: zeros would hide a wrong gradient."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    if isinstance(model, contrastive.BYOL):
        online = nn.Sequential(model.encoder, model.projection_head)
        model.target.load_state_dict(online.state_dict())


# ---------------------------------------------------------------- the comparison

def largest_difference(values, others):
    largest = 0.0
    for value, other in zip(values, others, strict=True):
        if value is not None and value.numel():
            largest = max(largest, float((value - other).abs().max()))
    return largest


def gradients(model):
    return [p.grad for p in model.parameters()]


def compare(name, task, model, batch):
    """Whether N processes and one agree. Prints by how much they differ."""
    randomize(model.train())
    alone = model
    together = distributed.sync_batch_norm(deepcopy(model))

    world_size, rank = distributed.WORLD_SIZE, distributed.RANK
    distributed.WORLD_SIZE, distributed.RANK = 1, 0
    expected, _ = task(alone, batch)
    expected.backward()
    distributed.WORLD_SIZE, distributed.RANK = world_size, rank

    loss, _ = task(together, batch)
    loss.backward()
    distributed.average_gradients(together)
    loss = distributed.average_over_processes(loss.detach())

    used = [gradient for gradient in gradients(alone) if gradient is not None]
    size = max(float(gradient.abs().max()) for gradient in used)
    off = [
        largest_difference([expected.detach()], [loss]),
        largest_difference(gradients(alone), gradients(together)) / size,
        largest_difference(alone.buffers(), together.buffers()),
    ]
    print(f"{name}: loss {off[0]:.1e}, gradients {off[1]:.1e}, running statistics {off[2]:.1e}")
    if loss.dtype == torch.float64:
        allowed = [1e-10, 1e-8, 1e-6]                # the statistics are float32
    else:
        allowed = [1e-5, 1e-5, 1e-6]
    return all(value <= limit for value, limit in zip(off, allowed, strict=True))


def main():
    distributed.join(torch.device("cpu"))
    torch.manual_seed(0)
    views = torch.rand(2, 8, 3, 16, 16, dtype=torch.float64)
    results = [
        compare("simclr", simclr, image_model(contrastive.SimCLR), views),
        compare("byol", byol, image_model(contrastive.BYOL), views),
        compare(
            "autoencoder", decorrelated_codes,
            image_model(autoencoder.Autoencoder, (16, 16), code=5), views,
        ),
        compare("whole texts", whole_texts, text_model(), whole_text_batch()),
    ]
    for size in (8, 3, 1):                           # with 1, some processes have no window
        name = f"{size} windows"
        results.append(compare(name, windows, text_model(), window_batch(size)))
    distributed.leave()
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
