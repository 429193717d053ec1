"""Features: what an encoder says about whole texts and whole images.

The functions take any number of examples of any size. Without gradient they keep the
activations of one batch at a time. How much a batch holds depends on the size of its examples.
"""

import math

import numpy as np
import torch

from minissl import transformer


def no_progress(line):
    """The default for `progress`: show nothing."""


# ---------------------------------------------------------------- texts

# At width 256 the widest activations of a block take 16 MB in bfloat16. Batches of 2**15 tokens
# were slower by a third (EXPERIMENTS.md, "How many tokens should a batch have without gradient?").
TOKENS_A_BATCH = 2**13


@torch.no_grad()
def text_features(model, texts, autocast, device="cpu", progress=no_progress):
    """Features (N, d) float32 of N whole texts, on the CPU: their document vectors, normalized.

    Each vector gets the mean 0 and the standard deviation 1. Arguments as of `document_vectors`.
    """
    return transformer.norm(document_vectors(model, texts, autocast, device, progress))


def document_vectors(model, texts, autocast, device="cpu", progress=no_progress, draws=None):
    """The document vectors (N, d) float32 of N whole texts, on the CPU, with gradient.

    A text that is longer than the model's window is read in nearly equal parts. Its vector
    is the mean of the vectors of its parts, weighted by their lengths.
    model: a TextEncoder; texts: Texts; autocast: the context for the forward pass; progress: a
    function that shows one line; draws: None to read whole texts, or see `windows_of`.
    """
    windows, text_of_window = windows_of(texts, model.window, draws)
    total = np.bincount(text_of_window, windows.lengths, len(texts))      # (N,) tokens
    order = np.argsort(-windows.lengths, kind="stable")         # similar lengths share a batch
    # A token of a wider model takes more memory.
    tokens_a_batch = TOKENS_A_BATCH * 256 // max(256, model.token_embedding.embedding_dim)
    vectors = torch.zeros(len(texts), model.document_columns)

    begin = 0
    while begin < len(order):
        longest = windows.lengths[order[begin]]
        size = max(1, tokens_a_batch // longest)
        batch = order[begin:begin + size]
        tokens, lengths = map(torch.from_numpy, windows.padded(batch))    # (B, T), (B,)
        with autocast:
            encoded = model.encode(tokens.to(device), lengths.to(device)).cpu()   # (B, d)
        owner = text_of_window[batch]                           # (B,)
        weight = torch.from_numpy(windows.lengths[batch] / total[owner]).float()
        vectors.index_add_(0, torch.from_numpy(owner), encoded * weight[:, None])
        begin += len(batch)
        progress(f"encoding: {begin:,} of {len(order):,} windows")
    return vectors


MOST_WINDOWS = 8            # of a text in a training step, so that long texts do not fill memory


def windows_of(texts, window, draws=None):
    """The windows of N texts, as Texts, and the text to which each belongs, (W,) int64.

    Without `draws` these are all windows. Otherwise they are at most MOST_WINDOWS neighbouring
    windows of each text, and draws (N,), uniform in [0, 1), say which one is the first.
    """
    windows = texts.split_long(window)
    parts = -(-texts.lengths // window)                         # (N,) of each text, rounded up
    text_of_window = np.repeat(np.arange(len(texts)), parts)    # (W,)
    if draws is None:
        return windows, text_of_window
    before = np.cumsum(parts) - parts                           # (N,) windows of earlier texts
    part = np.arange(len(windows)) - before[text_of_window]     # (W,): 0, 1, ... in each text
    spare = np.maximum(parts - MOST_WINDOWS, 0)                 # (N,)
    first = np.floor(draws.numpy() * (spare + 1)).astype(int)   # (N,)
    place = part - first[text_of_window]                        # (W,)
    kept = (0 <= place) & (place < MOST_WINDOWS)
    return windows.select(kept), text_of_window[kept]


# ---------------------------------------------------------------- images

BYTES_A_BATCH = 2**24       # of float32 pixels; a feature map of width 64 takes five times that


def images_a_batch(shape, most):
    """How many images of shape (C, H, W) make a batch: at most `most`, and fewer large ones.

    >>> images_a_batch((3, 32, 32), 250), images_a_batch((3, 512, 512), 250)
    (250, 5)
    """
    return min(most, max(1, BYTES_A_BATCH // (4 * math.prod(shape))))


@torch.no_grad()
def image_features(encode, images, autocast, device="cpu", progress=no_progress, batch=250,
                   mirror=False):
    """encode over all of N images -> features (N, D) float32, on the CPU.

    encode: from x (B, C, H, W), floats in [0, 1], to (B, D); images: a uint8 tensor (N, C, H, W)
    or Images; autocast: the context for the forward pass; progress: a function that shows one
    line; batch: at most this many images at a time; mirror: the features are the mean of those
    of the image and of its mirror image, which costs two forward passes.
    """
    size = images_a_batch(images.shape[1:], batch)
    features = []
    for begin in range(0, len(images), size):
        x = images[begin:begin + size].to(device).float() / 255           # (B, C, H, W)
        with autocast:
            encoded = encode(x).float()
            if mirror:
                encoded = (encoded + encode(x.flip(3)).float()) / 2
        features.append(encoded.cpu())
        progress(f"encoding: {min(begin + size, len(images)):,} of {len(images):,} images")
    return torch.cat(features)
