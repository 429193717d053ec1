"""A convolutional autoencoder: learn from images without labels by rebuilding them from a few numbers.

The encoder turns an image x into a code z of D numbers, the decoder turns the code back into an image x̂, and both
learn to lose as little as possible on the way,

    L = ‖x − x̂‖² + β R(z)            z = f(x̃),  x̂ = g(z)

x̃ is x itself, or x corrupted: with noise added (a denoising autoencoder) or with patches cut out (as in a masked
autoencoder). What is to be rebuilt is the clean x always. R asks the code for a property that rebuilding alone does
not: `sparse`, each number far from 0 for few images; `decorrelated`, no two that say the same.

    Hinton and Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural Networks"
    Vincent et al. 2008, "Extracting and Composing Robust Features with Denoising Autoencoders"
    He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377
    Bardes et al. 2021, "VICReg", arXiv 2105.04906, equation 4     the covariance term

Differences from the papers:
- The code is batch-normalised without learned scale. Otherwise the decoder answers a penalty on z with larger weights,
  z shrinks, and nothing has become sparse; so, too, the covariance is a correlation.
- A masked autoencoder is a transformer that never sees the hidden patches. Here they are set to the mean colour: a
  convolution needs its grid.
- The loss is the mean over all pixels, the visible ones, too.

This file needs torch alone. Shapes: B images, C channels, H × W pixels, D columns of the code. Read next: train_ae.py.
"""

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- the loss

def autoencoder_loss(x, x_hat, z, beta=0.0, regularizer="none"):
    """‖x − x̂‖² + β R(z), and its two terms.

    How each is averaged, so that β means the same at every size of images, batch and code:

        ‖x − x̂‖²         mean over the C · H · W numbers of an image, then over the B images
        none             0
        sparse           |z|: mean over the D numbers of a code, then over the B images
        decorrelated     Σ_{i≠j} cov_ij² / D, with cov (D, D) the covariance of the batch's codes, divided by B − 1

    Arguments: x, x_hat (B, C, H, W); z (B, D); beta ≥ 0. Returns (loss, squared error, R), three scalars, float32 or
    better. Raises ValueError for a negative beta, an unknown regularizer, or a covariance of fewer than 2 codes.
    """
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, found {beta}")
    x, x_hat, z = (t if t.dtype == torch.float64 else t.float() for t in (x, x_hat, z))
    error = (x - x_hat).square().mean((1, 2, 3)).mean()
    if regularizer == "none":
        penalty = torch.zeros_like(error)
    elif regularizer == "sparse":
        penalty = z.abs().mean(1).mean()
    elif regularizer == "decorrelated":
        if len(z) < 2:
            raise ValueError(f"a covariance needs at least 2 codes, found {len(z)}")
        centred = z - z.mean(0)
        with torch.autocast(z.device.type, enabled=False):
            covariance = centred.T @ centred / (len(z) - 1)                   # (D, D)
        penalty = (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
    else:
        raise ValueError(f"regularizer must be none, sparse or decorrelated, found {regularizer!r}")
    return error + beta * penalty, error, penalty


def sparsity(z):
    """1 − (mean |z|)² / mean z² over the batch, the mean over the columns of z (B, D): 0 if a number is equally far
    from 0 for all images, 0.36 if normally distributed, 1 if it is 0 for all but a few. (Treves and Rolls 1991)"""
    return (1 - z.abs().mean(0).square() / z.square().mean(0).clamp(min=1e-12)).mean()


def correlation(z):
    """Root of the mean squared correlation of two different columns of z (B, D): 0 decorrelated, 1 all say the same."""
    c = torch.corrcoef(z.T).nan_to_num()
    return ((c.square().sum() - c.diagonal().square().sum()) / (len(c) * (len(c) - 1))).sqrt()


# ---------------------------------------------------------------- corruption

def corrupt(x, noise=0.0, masked=0.0, patch=8, generator=None):
    """x̃: x (B, C, H, W) in [0, 1] with Gaussian noise of deviation `noise`, and with the share `masked` of its
    patch × patch squares set to the batch's mean colour: in each image the same number, at least one and never all,
    drawn for each image anew.

    generator: a CPU generator, so that the draw is the same on every device.
    """
    B, _, H, W = x.shape
    if noise:
        x = x + noise * torch.randn(x.shape, generator=generator).to(x.device)
    if masked:
        h, w = -(-H // patch), -(-W // patch)
        draw = torch.rand(B, h * w, generator=generator)
        count = min(max(1, round(masked * h * w)), h * w - 1)
        hidden = draw.argsort(1).argsort(1) < count                           # (B, h·w)
        hidden = hidden.view(B, 1, h, w).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        hidden = hidden[..., :H, :W].to(x.device)                             # (B, 1, H, W)
        x = torch.where(hidden, x.mean((0, 2, 3), keepdim=True), x)
    return x


# ---------------------------------------------------------------- the model

def convolution(d_in, d_out, stride=1):
    return nn.Sequential(nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(d_out),
                         nn.ReLU())


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(convolution(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False),
                                    nn.BatchNorm2d(width))
        nn.init.zeros_(self.layers[-1].weight)                                # at first the block does nothing

    def forward(self, x):
        return F.relu(x + self.layers(x))


class Autoencoder(nn.Module):
    """Images (B, C, H, W), floats in [0, 1] -> codes (B, D) -> images of the same size.

    Arguments: size (H, W), each at least 8, any: the image is padded to multiples of 8 and the reconstruction cropped;
    mean, deviation (C,) of the pixels that it learned from; code D; width, of the first feature map (the shapes below
    are for 64), doubled twice.
    """

    def __init__(self, size, mean, deviation, code=128, width=64):
        super().__init__()
        self.channels, self.size = len(mean), tuple(size)
        self.grid = tuple(-(-side // 8) for side in size)                     # h, w of the smallest map
        self.register_buffer("mean", torch.as_tensor(mean).float().view(-1, 1, 1))
        self.register_buffer("deviation", torch.as_tensor(deviation).float().view(-1, 1, 1))
        C, (h, w), (first, second, last) = len(self.mean), self.grid, (width, 2 * width, 4 * width)
        self.to_second = nn.Sequential(convolution(4 * C, first), convolution(first, second, stride=2),
                                       ResidualBlock(second))
        self.to_last = nn.Sequential(convolution(second, last, stride=2), ResidualBlock(last))
        self.to_code = nn.Sequential(nn.Linear(last * h * w, code, bias=False), nn.BatchNorm1d(code, affine=False))
        self.from_code = nn.Sequential(nn.Linear(code, last * h * w), nn.ReLU(), nn.Unflatten(1, (last, h, w)))
        self.decoder = nn.Sequential(      # each shuffle: a quarter of the maps, twice the size
            convolution(last, 4 * second), nn.PixelShuffle(2), convolution(second, 4 * first), nn.PixelShuffle(2),
            nn.Conv2d(first, 4 * C, 3, padding=1), nn.PixelShuffle(2))

    def maps(self, x):
        """The encoder's feature maps before the last: (B, 128, 2h, 2w), where h, w are an eighth of H, W."""
        (H, W), (h, w) = x.shape[2:], self.grid
        if (H, W) != self.size:
            raise ValueError(f"images of {H} × {W}, where this model was made for {self.size[0]} × {self.size[1]}")
        x = (x - self.mean) / self.deviation
        x = F.pad(x, (0, 8 * w - W, 0, 8 * h - H), mode="replicate")
        x = F.pixel_unshuffle(x, 2)                                           # (B, 4C, H/2, W/2)
        return self.to_second(x.contiguous(memory_format=torch.channels_last))

    def decode(self, z):
        """Codes (B, D) -> images (B, C, H, W), about in [0, 1]."""
        x = self.from_code(z)                                                 # (B, 256, h, w)
        x = self.decoder(x.contiguous(memory_format=torch.channels_last))     # (B, C, 8h, 8w)
        return x[..., :self.size[0], :self.size[1]] * self.deviation + self.mean

    def encode(self, x):
        """Images (B, C, H, W), floats in [0, 1] -> (B, 8 · width): the map before the last, averaged over quadrants.
        Put the model in evaluation mode first, or batch norm moves.

        Not the code: z keeps what rebuilding needs, where each blob is and its colour, all mixed in every column. The
        maps on the way there say which patterns occur; averaged, without where. (A prototype's probe at 50 / 500
        labels a class on CIFAR-10: z 32 / 41, this 36 / 48; but random weights give most of that, EXPERIMENTS.md.)
        """
        return F.adaptive_avg_pool2d(self.maps(x), 2).flatten(1)

    def forward(self, x):
        z = self.to_code(self.to_last(self.maps(x)).flatten(1))               # (B, D)
        return self.decode(z), z
