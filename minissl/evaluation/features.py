"""Features: what an encoder says about whole texts and whole images.

Both functions take any number of examples of any size, and never hold more of them at once than
a batch. How much a batch holds depends on the size of its examples.

Read next: probes.py, which measures how good features are.
"""

import math

import numpy as np
import torch


def no_progress(line):
    """The default for `progress`: show nothing."""


# ---------------------------------------------------------------- texts

TOKENS_A_BATCH = 2**15      # at width 256 the widest activations of a block then take 128 MB


@torch.no_grad()
def text_features(model, texts, autocast, device="cpu", progress=no_progress):
    """model.encode over all of each of N texts -> features (N, d) float32, on the CPU.

    A text that is longer than the model's window is read in nearly equal parts. Its features
    are the mean of the features of its parts, weighted by their lengths.
    model: a TextEncoder; texts: Texts; autocast: the context for the forward pass; progress: a
    function that shows one line.
    """
    windows = texts.split_long(model.window)
    parts = -(-texts.lengths // model.window)                   # (N,) of each text, rounded up
    text_of_window = np.repeat(np.arange(len(texts)), parts)    # (W,)
    order = np.argsort(-windows.lengths, kind="stable")         # similar lengths share a batch
    wide = max(1, model.token_embedding.embedding_dim / 256)
    features = torch.zeros(len(texts), model.document_columns)

    begin = 0
    while begin < len(order):
        longest = windows.lengths[order[begin]]
        size = max(1, int(TOKENS_A_BATCH / wide) // longest)
        batch = order[begin:begin + size]
        tokens, lengths = map(torch.from_numpy, windows.padded(batch))    # (B, T), (B,)
        with autocast:
            encoded = model.encode(tokens.to(device), lengths.to(device)).cpu()   # (B, d)
        owner = torch.from_numpy(text_of_window[batch])         # (B,)
        weight = lengths / torch.from_numpy(texts.lengths)[owner]
        features.index_add_(0, owner, encoded * weight[:, None])
        begin += len(batch)
        progress(f"encoding: {begin:,} of {len(order):,} windows")
    return features


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
