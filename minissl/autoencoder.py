"""A convolutional autoencoder: learn from images by rebuilding them from a few numbers.

The encoder turns an image x into a code z of D numbers. The decoder turns the code back
into an image x̂. Both learn to lose as little as possible on the way:

    L = ‖x − x̂‖² + β R(z)            z = f(x̃),  x̂ = g(z)

Both terms are averaged: see `autoencoder_loss`. x̃ is the image x itself or a corrupted
copy: with noise added (a denoising autoencoder) or with patches cut out (as in a masked
autoencoder). The image to rebuild is always the clean x. R asks for a property of the code
that rebuilding alone does not ask for:

    sparse          each number is near 0 for most images
    decorrelated    no two numbers are correlated

Most of the squared error of a photograph is the colour and the brightness of large areas.
So there is a second target: the hidden patches alone, each with mean 0 and variance 1. What
is left of a patch is its pattern and its hue.

    Hinton and Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural Networks"
    Vincent et al. 2008, "Extracting and Composing Robust Features with Denoising
    Autoencoders"
    He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377
    Bardes et al. 2021, "VICReg", arXiv 2105.04906, equation 4: the covariance term

Differences from the papers:
- The code passes a batch norm without learned scale. Otherwise the encoder could satisfy
  R by shrinking z, while the decoder undoes it with larger weights. The norm also turns
  the covariance into a correlation.
- A masked autoencoder is a transformer that never sees the hidden patches. A convolution
  needs its grid, so here the hidden patches are set to the mean colour.
- The loss is the mean over all pixels, the visible ones included. With normalized patches it
  is the mean over the hidden pixels alone, as in He et al.
- The squares of 2 × 2 pixels are whitened first, and the two kernels of each residual block
  begin as the identity. Jordan 2024, arXiv 2404.00498, has both for classification.
- Batch norm learns its running statistics from the corrupted images, although the features are
  read from whole ones. (The transformer of a masked autoencoder has no such statistics.) Those of
  whole images are no better: EXPERIMENTS.md, "Should batch norm see whole images?".

This file needs torch alone. Read next: train_ae.py.

The letters of the shapes:

    B  images                    D        numbers of a code
    C, H, W  channels, height and width of an image
    h, w     height and width of the smallest map: an eighth of H and W, rounded up
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn


PATCH = 8       # pixels: height and width of the squares that are hidden, or normalized


# ---------------------------------------------------------------- the loss

def autoencoder_loss(x, x_hat, z, beta=0.0, regularizer="none", hidden=None):
    """‖x − x̂‖² + β R(z), and both terms.

    They are averaged so that β means the same for every size of image, batch and code:

        ‖x − x̂‖²         the mean over the C · H · W numbers of an image, and over B
        none             0
        sparse           the mean of |z| over the D numbers of a code, and over B
        decorrelated     Σ_{i≠j} cov_ij² / D, where cov (D, D) is the covariance of the
                         batch's codes, divided by B − 1

    Arguments: x and x_hat (B, C, H, W); z (B, D); beta ≥ 0; regularizer, one of the three;
    hidden (B, 1, H, W) bool, at least one pixel of each image: the squared error is the mean
    over these pixels alone.
    Returns three scalars, in float32 or better: the loss, the squared error, and R.
    Raises ValueError for a negative beta, an unknown regularizer, and a covariance of fewer
    than 2 codes.
    """
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, but is {beta}")
    if x.dtype != torch.float64:
        x, x_hat, z = x.float(), x_hat.float(), z.float()
    errors = (x - x_hat).square().mean(1, keepdim=True)                   # (B, 1, H, W)
    if hidden is None:
        error = errors.mean()
    else:
        error_sum = (errors * hidden).sum((1, 2, 3))                      # (B,)
        pixels = hidden.sum((1, 2, 3))                                    # (B,)
        error = (error_sum / pixels).mean()
    if regularizer == "none":
        penalty = torch.zeros_like(error)
    elif regularizer == "sparse":
        penalty = z.abs().mean()
    elif regularizer == "decorrelated":
        penalty = covariance_penalty(z)
    else:
        raise ValueError(
            f"regularizer must be none, sparse or decorrelated, but is {regularizer!r}"
        )
    return error + beta * penalty, error, penalty


def covariance_penalty(z):
    """Σ_{i≠j} cov_ij² / D for codes z (B, D)."""
    B, D = z.shape
    if B < 2:
        raise ValueError(f"a covariance needs at least 2 codes, but there is {B}")
    centred = z - z.mean(0)
    with without_autocast(z.device):
        covariance = centred.T @ centred / (B - 1)                        # (D, D)
    everything = covariance.square().sum()
    variances = covariance.diagonal().square().sum()
    return (everything - variances) / D


def without_autocast(device):
    """A context in which matrix products keep float32, even inside an autocast context.

    Before torch 2.5 there is no autocast on MPS, so there is nothing to switch off. (This
    function is also in contrastive.py, because each lecture file stands alone.)
    """
    if torch.amp.autocast_mode.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def normalize_patches(x, patch=PATCH):
    """Images whose patch × patch squares have mean 0 and variance 1, and the mean and std.

        (x − μ) / σ         μ and σ² are the mean and the variance of the C · patch · patch
                            numbers of a square, σ² at least 1e-6

    A decoder that always says 0 has the squared error 1, the variance of a square. Only a grey
    square without a pattern becomes 0, where this error is 0. One of another colour keeps its
    hue, because the mean is over the channels as well. At the border of an image a square can be
    smaller.

    x: (B, C, H, W) in [0, 1]. Returns the normalized images (B, C, H, W), and μ and σ of each
    pixel's square, (B, 1, H, W) both, so that x = normalized · σ + μ.
    He et al. 2021, section 3, "Reconstruction target".
    """
    H, W = x.shape[2:]

    def mean_of_patch(values):
        """(B, C, H, W) -> (B, 1, H, W)"""
        mean = F.avg_pool2d(values.mean(1, keepdim=True), patch, ceil_mode=True)
        return enlarge(mean, patch)[..., :H, :W]

    mean = mean_of_patch(x)
    variance = mean_of_patch((x - mean).square())
    std = variance.clamp(min=1e-6).sqrt()
    return (x - mean) / std, mean, std


def enlarge(x, patch):
    """Each pixel of x (B, C, h, w) as a square: (B, C, h · patch, w · patch)."""
    return x.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


# ---------------------------------------------------------------- what the loss does not show

def sparsity(z):
    """How rarely a number of the code is far from 0, the mean over the columns of z (B, D).

    1 − (mean |z|)² / mean z² is 0 for a number that is equally far from 0 for all images,
    0.36 for a normal distribution, and 1 for a number that is 0 for nearly all images.
    Treves and Rolls 1991, "What determines the capacity of autoassociative memories".
    """
    power = z.square().mean(0).clamp(min=1e-12)
    return (1 - z.abs().mean(0).square() / power).mean()


def correlation(z):
    """The root mean square correlation of two different columns of z (B, D).

    It is 0 if the columns are uncorrelated, and 1 if all are copies of one column.
    """
    c = torch.corrcoef(z.T).nan_to_num()                                  # (D, D)
    D = len(c)
    off_diagonal = c.square().sum() - c.diagonal().square().sum()
    return (off_diagonal / (D * (D - 1))).sqrt()


# ---------------------------------------------------------------- corruption

def corrupt(x, noise=0.0, masked=0.0, patch=PATCH, generator=None):
    """x̃, the images with noise added, with patches cut out, or both; and what was cut out.

    Arguments:
        x: (B, C, H, W) in [0, 1]
        noise: the standard deviation of Gaussian noise, where white is 1
        masked: the share of the patch × patch squares that are set to the mean colour of
            the batch (after the noise). Each image loses equally many of them, at least
            one and never all: so none, if it is a single patch.
        generator: a CPU generator, so that the draw is the same on every device
    Returns x̃ (B, C, H, W), and hidden (B, 1, H, W) bool: True at the pixels that were cut out.
    """
    B, _, H, W = x.shape
    hidden = torch.zeros(B, 1, H, W, dtype=torch.bool, device=x.device)
    if noise:
        x = x + noise * torch.randn(x.shape, generator=generator).to(x.device)
    if masked:
        hidden = choose_patches(x.shape, masked, patch, generator).to(x.device)
        mean_colour = x.mean((0, 2, 3), keepdim=True)
        x = torch.where(hidden, mean_colour, x)
    return x, hidden


def choose_patches(shape, masked, patch, generator):
    """True at the pixels to hide: (B, 1, H, W) bool, for images of shape (B, C, H, W)."""
    B, _, H, W = shape
    rows, columns = math.ceil(H / patch), math.ceil(W / patch)
    patches = rows * columns
    count = round(masked * patches)
    count = min(max(count, 1), patches - 1)
    draw = torch.rand(B, patches, generator=generator)
    rank = draw.argsort(1).argsort(1)     # the place of each patch in a random order
    hidden = (rank < count).view(B, 1, rows, columns)
    return enlarge(hidden, patch)[..., :H, :W]


# ---------------------------------------------------------------- the model

def conv_norm_relu(d_in, d_out, stride=1):
    """3 × 3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(d_out),
        nn.ReLU(),
    )


class ResidualBlock(nn.Module):
    """(B, width, H, W) -> the same shape."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            conv_norm_relu(width, width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        # At first both kernels copy their input. The scale of the last norm is 0, so at
        # first the block adds nothing.
        nn.init.dirac_(self.layers[0][0].weight)
        nn.init.dirac_(self.layers[1].weight)
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x):
        return F.relu(x + self.layers(x))


def mean_of_strips(maps, strips):
    """The mean of each horizontal strip: maps (B, D, H, W) -> (B, strips · D).

    If H is not divisible by the number of strips, the row at a border belongs to both strips (as in
    F.adaptive_avg_pool2d, which MPS lacks for such sizes). With fewer rows than strips, a row
    belongs to several.
    """
    H = maps.shape[2]
    means = []
    for n in range(strips):
        top, bottom = n * H // strips, math.ceil((n + 1) * H / strips)
        means.append(maps[:, :, top:bottom].mean((2, 3)))     # (B, D)
    return torch.cat(means, dim=1)


class Autoencoder(nn.Module):
    """Images (B, C, H, W), floats in [0, 1] -> codes (B, D) -> images of the same size.

    Arguments:
        size: (H, W), at least 8 each. Images are padded to multiples of 8 on the way in,
            and cropped on the way out.
        mean, std: (C,) of the training pixels in [0, 1]; they are stored with the weights
        whitening: (4C, 4C), by which the squares of 2 × 2 pixels are multiplied after the
            mean is subtracted (`mean_and_whitening` of data/images.py)
        targets: what it rebuilds, "pixels" or "normalized" patches
        code: D
        width: of the first feature map; the next two are twice and four times as wide.
            The shapes below are for width 64.
    """

    def __init__(self, size, mean, std, whitening, code=128, width=64, targets="pixels"):
        super().__init__()
        self.channels, self.size = len(mean), tuple(size)
        self.targets = targets
        self.grid = tuple(math.ceil(side / 8) for side in size)           # (h, w)
        mean, std = torch.as_tensor(mean).float(), torch.as_tensor(std).float()
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))
        C = self.channels
        whitening = torch.as_tensor(whitening).float()
        self.register_buffer("whitening", whitening.view(4 * C, 4 * C, 1, 1))
        h, w = self.grid
        first, second, last = width, 2 * width, 4 * width

        self.to_second = nn.Sequential(                       # from (B, 4C, 4h, 4w)
            conv_norm_relu(4 * C, first),                        # (B, 64, 4h, 4w)
            conv_norm_relu(first, second, stride=2),             # (B, 128, 2h, 2w)
            ResidualBlock(second),
        )
        self.to_last = nn.Sequential(
            conv_norm_relu(second, last, stride=2),              # (B, 256, h, w)
            ResidualBlock(last),
        )
        self.to_code = nn.Sequential(
            nn.Linear(last * h * w, code, bias=False),
            nn.BatchNorm1d(code, affine=False),               # (B, D)
        )
        self.from_code = nn.Sequential(
            nn.Linear(code, last * h * w),
            nn.ReLU(),
            nn.Unflatten(1, (last, h, w)),                    # (B, 256, h, w)
        )
        self.decoder = nn.Sequential(                         # a shuffle doubles the size
            conv_norm_relu(last, 4 * second),
            nn.PixelShuffle(2),                               # (B, 128, 2h, 2w)
            conv_norm_relu(second, 4 * first),
            nn.PixelShuffle(2),                               # (B, 64, 4h, 4w)
            nn.Conv2d(first, 4 * C, 3, padding=1),
            nn.PixelShuffle(2),                               # (B, C, 8h, 8w)
        )

    def prepare(self, x):
        """What the first convolution gets: (B, 4C, 4h, 4w), whitened squares of 2 × 2 pixels.

        Raises ValueError for images of another size.
        """
        H, W = x.shape[2:]
        h, w = self.grid
        if (H, W) != self.size:
            raise ValueError(
                f"the images have {H} × {W} pixels, but this model was made for "
                f"{self.size[0]} × {self.size[1]}"
            )
        x = x - self.mean
        x = F.pad(x, (0, 8 * w - W, 0, 8 * h - H), mode="replicate")
        x = F.pixel_unshuffle(x, 2)                           # (B, 4C, 4h, 4w)
        with without_autocast(x.device):                      # it magnifies rounding errors
            return F.conv2d(x, self.whitening)

    def maps(self, x):
        """The feature maps: (B, 64, 4h, 4w), (B, 128, 2h, 2w) and (B, 256, h, w)."""
        first = self.to_second[0](self.prepare(x))
        second = self.to_second[1:](first)
        return first, second, self.to_last(second)

    def decode(self, z):
        """Codes (B, D) -> images (B, C, H, W), approximately in [0, 1].

        If the targets are normalized patches, these are normalized patches.
        """
        x = self.from_code(z)                                 # (B, 256, h, w)
        x = self.decoder(x)                                   # (B, C, 8h, 8w)
        H, W = self.size
        x = x[..., :H, :W]
        if self.targets == "normalized":
            return x
        return x * self.std + self.mean

    def encode(self, x):
        """Images (B, C, H, W), floats in [0, 1] -> features (B, 18 · width + D).

        These are for probes. The code alone is what `forward` returns beside the images.
        They are read at four depths, each averaged over horizontal strips of the image:

            first maps   (B, 64, 4h, 4w)      2 strips: edges and colours
                ↓
            second maps  (B, 128, 2h, 2w)     4 strips: small patterns
                ↓
            last maps    (B, 256, h, w)       2 strips: larger patterns
                ↓
            code         (B, D)               the whole image

        The code adds less than a point with 10 labels a class, and about two with 500
        (EXPERIMENTS.md, "Where should the features of an autoencoder be read?"). Each part is
        scaled to length 1, so that none outweighs the others. Most of the accuracy comes from
        the architecture: compare with the untrained encoder (RESULTS.md).

        Put the model into evaluation mode first, or the batch norms will move.
        """
        first, second, last = self.maps(x)
        parts = [
            mean_of_strips(first, 2),
            mean_of_strips(second, 4),
            mean_of_strips(last, 2),
            self.to_code(last.flatten(1)),                    # (B, D)
        ]
        return torch.cat([F.normalize(part.float(), dim=1) for part in parts], dim=1)

    def forward(self, x):
        """Images (B, C, H, W) -> (reconstructions (B, C, H, W), codes (B, D))."""
        _, _, last = self.maps(x)                             # (B, 256, h, w)
        z = self.to_code(last.flatten(1))                     # (B, D)
        return self.decode(z), z
