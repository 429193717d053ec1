"""A convolutional encoder that learns from images by recognising views of one image.

**SimCLR.** Distort each of B images V times at random, encode each view and project it:
z (V, B, D). Each view should find the other views of its image among all views of the
batch. For an anchor i and each of its V − 1 positives p,

    L_{i,p} = −log( exp(s_ip) / Σ_{j ≠ i} exp(s_ij) )

where s_ij is a similarity divided by the temperature τ: the cosine of z_i and z_j, or their
dot product. InfoNCE is the mean over all i and p. This is the matrix s for V = 2 and B = 3.
The rows are the anchors:

               view 0       view 1
             a   b   c    a   b   c
          a  .   −   −    +   −   −        .  self: in no sum, and in no gradient
  view 0  b  −   .   −    −   +   −        +  positive: another view of the same image
          c  −   −   .    −   −   +        −  negative: any view of another image
          a  +   −   −    .   −   −
  view 1  b  −   +   −    −   .   −        Each row is a classification among VB − 1
          c  −   −   +    −   −   .        candidates.

If the encoder collapses, so that all z are alike, the loss is ln(VB − 1). This is the
chance level in the log. With more than two views, an anchor has V − 1 positives, each with
a logarithm of its own. They share a probability of at most 1, so even the loss of a perfect
encoder is at least ln(V − 1).

**BYOL** has no negatives. A predictor takes the projection of one view and predicts the
projections of the other views. Those come from a second network, the target, which is a
slow moving average of the first and receives no gradient. For views v ≠ w of an image,

    L_{v,w} = 2 − 2 cos(q_v, t_w)              q = predictor(z),  t from the target
    target ← r · target + (1 − r) · (encoder and projection head)

The loss is the squared distance of q_v and t_w, both scaled to length 1.

Nothing in this loss forbids a collapse. The batch norm at the end of the projection rules out
that all projections are one point, but they can shrink to a few directions. After 300 steps
with two views and earlier settings they use 44 of 128 directions (their effective rank, see
below), without the predictor 10, and 2 if the encoder itself takes the place of the target,
with gradient (EXPERIMENTS.md, "What keeps BYOL from collapsing?"). SimSiam (see below) has the
predictor, and the encoder without gradient in place of the target.

    Chen et al. 2020, "SimCLR", arXiv 2002.05709
        two views, the projection head, InfoNCE under the name NT-Xent
    van den Oord et al. 2018, "Contrastive Predictive Coding", arXiv 1807.03748
        InfoNCE
    Khosla et al. 2020, "Supervised Contrastive Learning", arXiv 2004.11362, equation 2
        several positives: one logarithm for each, not the logarithm of their sum
    Grill et al. 2020, "Bootstrap Your Own Latent", arXiv 2006.07733

Differences from the papers, most of them for two CPU cores and images of 32 × 32:
- The encoder is a ResNet with two residual blocks. It begins by treating 2 × 2 pixels as
  one pixel with 12 channels.
- Views have three quarters of the image's height and width. This makes 1.8 times as many
  images a second. The probe reads whole images.
- A crop holds at least a fifth of a photograph and half of a drawn shape (8 % in the papers).
- There is no blur, which at this size would remove what there is to see, and no solarization.
- The colours change by one affine map for each image, without clamping or rounding in between.
  The hue turns around the grey axis of YIQ, not in HSV.
- The squares of 2 × 2 pixels are whitened first, and the kernels begin as the identity (Jordan
  2024, arXiv 2404.00498; EXPERIMENTS.md, "Do whitened squares and identity kernels help?").
- Muon replaces LARS (see optim.py).
- A batch has four views of 128 images, not two views of 4,096. Four views of 128 are better than
  two of 256 (EXPERIMENTS.md, "Are four views of half as many images better?").
- The hidden layer of the projection head has 2,048 columns at every width, and so has that of
  BYOL's predictor. Projections have 128 columns, for BYOL as well (256 in its paper).
- The features are read at three depths (see `SimCLR.encode`).
- BYOL's projections end with a batch norm, as in SimSiam (Chen and He 2020, arXiv
  2011.10566, section 3). It adds three to four points after 300 steps, and hardly anything
  after ten minutes (EXPERIMENTS.md, "What else does BYOL need?").
- BYOL's moving average begins at the rate 0.9, not 0.996 (EXPERIMENTS.md, "What does BYOL need
  with four views?").
- The weight decay is 0.02 for SimCLR and 0.2 for BYOL (EXPERIMENTS.md, "Does more weight decay
  help SimCLR?"). It belongs to Muon, so it does not compare with the papers' 1e-6.

This file needs torch alone. Read next: train_contrastive.py.

The letters of the shapes:

    V  views of an image     C, H, W  channels, height and width of an image
    B  images                h, w     height and width of a view
    D  columns of a projection
"""

import contextlib
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- losses

def info_nce(projections, temperature, similarity="cosine"):
    """InfoNCE: the mean over anchors and positives of −log softmax over all other views.

    Arguments: projections (V, B, D) with V ≥ 2 and B ≥ 2, of any float type (the logarithm
    is computed in float32 or better); temperature τ > 0; similarity, "cosine" or "dot", the dot
    product of the projections as they are.
    Returns a scalar: ln(VB − 1) if all projections are the same, and at least ln(V − 1). With
    two views and the cosine it is NT-Xent, equation 1 of SimCLR.
    Raises ValueError for arguments outside of these.
    """
    V, B, _ = projections.shape
    if V < 2 or B < 2:
        raise ValueError(f"info_nce needs at least 2 views of 2 images, but got {V} views of {B}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, but is {temperature}")
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity must be cosine or dot, but is {similarity!r}")

    z = projections.flatten(0, 1)         # (VB, D): row v · B + b is view v of image b
    if z.dtype != torch.float64:
        z = z.float()
    if similarity == "cosine":
        z = F.normalize(z, dim=1)
    with without_autocast(z.device):
        s = z @ z.T / temperature                             # (VB, VB)

    # The denominator: all views but the anchor itself. An entry of −∞ adds nothing to the
    # sum, and nothing to the gradient.
    # A common shortcut is exp(s).sum(1) − exp(s_ii), with exp(s_ii) as a constant. It has the
    # right value. With the dot product its gradient is wrong, because s_ii grows with the
    # length of z_i.
    itself = torch.eye(V * B, dtype=torch.bool, device=z.device)
    log_total = s.masked_fill(itself, float("-inf")).logsumexp(1)        # (VB,)
    log_total = log_total.view(V, 1, B)   # at [v, 0, b], of the anchor: view v of image b

    # The numerator: s between view v and view w of the same image b, at [v, w, b].
    same_image = s.view(V, B, V, B).diagonal(dim1=1, dim2=3)  # (V, V, B)
    is_positive = ~torch.eye(V, dtype=torch.bool, device=z.device)       # (V, V): v ≠ w
    return (log_total - same_image)[is_positive].mean()


def chance_level(V, B):
    """The InfoNCE of a collapsed encoder: ln(VB − 1).

    >>> round(chance_level(V=4, B=128), 3)
    6.236
    """
    return math.log(V * B - 1)


def byol_loss(predictions, targets):
    """The mean of 2 − 2 cos(q_v, t_w) over images and all pairs of different views v, w.

    Arguments: predictions q, from each view, and targets t, of each view, both (V, B, D) with
    V ≥ 2. No gradient reaches the targets.
    Returns a scalar from 0 to 4: 2 for unrelated vectors.
    Raises ValueError for a single view.
    Source: Grill et al. 2020, equation 2. There V = 2.
    """
    V = len(predictions)
    if V < 2:
        raise ValueError(f"byol_loss needs at least 2 views, but got {V}")
    q, t = predictions, targets.detach()
    if q.dtype != torch.float64:
        q, t = q.float(), t.float()
    cosine = F.cosine_similarity(q[:, None], t[None], dim=-1)            # (V, V, B)
    is_other = ~torch.eye(V, dtype=torch.bool, device=q.device)          # v ≠ w
    return (2 - 2 * cosine)[is_other].mean()


def without_autocast(device):
    """A context in which matrix products keep float32, even inside an autocast context.

    Before torch 2.5 there is no autocast on MPS, so there is nothing to switch off. (This
    function is also in autoencoder.py, because each lecture file stands alone.)
    """
    if torch.amp.autocast_mode.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- what the loss does not show

def alignment(projections):
    """The mean squared distance of the normalized projections of two views.

    It is 0 if the views of an image are alike, and so also after a collapse.

    projections (V, B, D), V ≥ 2, of which the first two views count. Wang and Isola 2020,
    "Understanding Contrastive Representation Learning through Alignment and Uniformity",
    arXiv 2005.10242.
    """
    a, b = F.normalize(projections[:2].float(), dim=-1)
    return (a - b).square().sum(-1).mean()


def uniformity(z):
    """log mean exp(−2 ‖z_i − z_j‖²) over all pairs of normalized rows of z (B, D).

    It is 0 if all rows are the same, and about −4 if they are spread over the sphere.
    (Wang and Isola 2020)
    """
    distance = torch.pdist(F.normalize(z.float(), dim=-1))
    return (-2 * distance.square()).exp().mean().log()


def effective_rank(z):
    """How many directions the rows of z (B, D) use: exp(entropy of the singular values).

    The rows are centred, and the singular values divided by their sum. A collapsed BYOL has a
    low loss, so the loss alone looks good. This number shows a collapse onto a few directions.
    It does not show one onto a single point, because it ignores the size of the spread; then
    `uniformity` is near 0. It is at most D and at most B − 1, so with few rows a low number
    means nothing. Roy and Vetterli 2007, "The Effective Rank: A Measure of Effective
    Dimensionality".
    """
    z = z.float()
    values = torch.linalg.svdvals(z - z.mean(0))
    share = values / values.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()


# ---------------------------------------------------------------- views

# The views decide what the encoder learns to ignore, so they must suit the data. A small
# crop of a drawn shape holds no shape, and with the weak colour changes that suit
# photographs, an encoder recognises two views of a drawing by their colours. Its loss falls
# all the same (EXPERIMENTS.md, "What does an encoder recognise in shapes?"). The names are
# those of `augment`.
VIEWS_OF_PHOTOGRAPHS = dict(crop=0.2, jitter=0.4, hue=0.1, grey=0.2)
VIEWS_OF_SHAPES = dict(crop=0.5, jitter=0.8, hue=0.5, grey=0.4)


def view_shape(H, W, height=0):
    """The even height and width of the views of images (H, W), at least 8 each.

    height: of a view; 0 means three quarters of the image's. The aspect ratio stays, apart from
    rounding and the minimum of 8.

    >>> view_shape(32, 32), view_shape(32, 64, height=16)
    ((24, 24), (16, 32))
    """
    scale = height / H if height else 0.75
    h = max(8, 2 * round(H * scale / 2))
    w = max(8, 2 * round(W * scale / 2))
    return h, w


def augment(images, size, numbers, crop, jitter, hue, grey, flip=True):
    """A distorted view of each image: a random crop, perhaps mirrored, in other colours.

    Every image has its own draw.

    Arguments:
        images: (B, C, H, W) uint8; C is 1 or 3
        size: (h, w) of the views
        numbers: (B, 11) uniform in [0, 1). They decide everything.
        crop: the smallest share of the image's area in a view
        jitter: the strength of the changes of brightness, contrast and saturation
        hue: the largest change of hue, in turns
        grey: the share of views without colour
        flip: whether half of the views are mirrored
    Returns (B, C, h, w) float32 in [0, 1]. Raises ValueError for images of another dtype.

    Crop and mirror are one affine map of the pixel grid, and the colours are one affine
    map of the colour space. So a view costs one resampling and one 3 × 3 product.
    Differences from torchvision: colours are not clamped between the steps, the steps
    have a fixed order, and a crop that would exceed the image is narrowed rather than
    drawn again. With `crop` above 0.75, a view may therefore hold less than that share:
    from 0.87 to 1 of the area if crop is 1.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"the images must be uint8, but are {images.dtype}")
    views = crop_and_flip(images, size, numbers[:, :5], crop, flip)
    return recolour(views, numbers[:, 5:], jitter, hue, grey)


def crop_and_flip(images, size, numbers, crop, flip):
    """Random resized crops of `crop` to 1 of the area, half of them mirrored.

    The aspect ratio of the image changes by a factor from 3/4 to 4/3. numbers (B, 5) in [0, 1).
    Returns (B, C, h, w) float32 in [0, 1], resampled bilinearly.
    """
    for_area, for_ratio, for_x, for_y, for_mirror = numbers.unbind(1)    # (B,) each
    area = crop + (1 - crop) * for_area
    ratio = (math.log(4 / 3) * (2 * for_ratio - 1)).exp()     # from 3/4 to 4/3
    stretch = ratio.sqrt()
    width = (area.sqrt() * stretch).clamp(max=1)              # as a share of the image's
    height = (area.sqrt() / stretch).clamp(max=1)
    x = (1 - width) * (2 * for_x - 1)                         # the centre, in [−1, 1]
    y = (1 - height) * (2 * for_y - 1)
    mirror = torch.ones_like(x)
    if flip:
        mirror = torch.where(for_mirror < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(x)
    # The point (u, v) of the view, both in [−1, 1], is read at this point of the image:
    #     [± width    0     x]
    #     [   0     height  y]  (u, v, 1)
    theta = torch.stack([width * mirror, zero, x, zero, height, y], dim=1).view(-1, 2, 3)
    B, C = images.shape[:2]
    grid = F.affine_grid(theta, [B, C, *size], align_corners=False)      # (B, h, w, 2)
    return sample_inside(images.float() / 255, grid)


def sample_inside(x, grid):
    """Read images x (B, C, H, W) at the points of grid (B, h, w, 2), bilinearly.

    The points are in [−1, 1], as in F.grid_sample. A point beyond the centre of the
    outermost pixel gets that pixel's value. This is padding_mode="border". It is written
    out here because that mode is missing on MPS before torch 2.13 (pytorch issue 125098).
    """
    H, W = x.shape[2:]
    last = torch.tensor([1 - 1 / W, 1 - 1 / H], device=x.device)         # centre of the last pixel
    grid = grid.clamp(-last, last)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


# Brightness (luma) and two colour axes, as in NTSC's YIQ. Hue is the angle in the plane of
# the colour axes, and saturation is the radius.
YIQ = torch.tensor([
    [0.299, 0.587, 0.114],
    [0.5959, -0.2746, -0.3213],
    [0.2115, -0.5227, 0.3112],
])
RGB = torch.linalg.inv(YIQ)


def recolour(x, numbers, jitter, hue, grey):
    """Change the colours of 80 % of the images, and remove them from the share `grey`.

        brightness    x · b
        contrast      m + c (x − m), with m the mean luma of the image
        saturation    scales the two colour axes
        hue           turns the two colour axes

    b, c and the saturation lie in 1 ± jitter, and the turn in ± hue.

    Arguments: x (B, C, h, w) in [0, 1]; numbers (B, 6) in [0, 1).
    Returns the same shape, clamped to [0, 1].
    """
    for_change, for_b, for_c, for_saturation, for_turn, for_grey = numbers.unbind(1)
    is_changed = for_change < 0.8                                        # (B,)
    strength = torch.where(is_changed, jitter, 0.0)
    brightness = 1 + strength * (2 * for_b - 1)
    contrast = 1 + strength * (2 * for_c - 1)
    saturation = 1 + strength * (2 * for_saturation - 1)
    gain = brightness * contrast
    if x.shape[1] == 1:
        mean = x.mean((1, 2, 3), keepdim=True)
        offset = ((1 - contrast) * brightness)[:, None, None, None] * mean
        return (x * gain[:, None, None, None] + offset).clamp(0, 1)

    turn = 2 * math.pi * hue * (2 * for_turn - 1)
    turn = torch.where(is_changed, turn, 0.0)
    saturation = torch.where(for_grey < grey, 0.0, saturation)
    cos, sin = saturation * turn.cos(), saturation * turn.sin()
    one, zero = torch.ones_like(turn), torch.zeros_like(turn)
    # [1 0 0]  the luma stays
    # [0 c −s] the colour axes turn and scale
    # [0 s c]
    change = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1)
    change = change.view(-1, 3, 3)
    yiq, rgb = YIQ.to(x.device), RGB.to(x.device)
    matrix = rgb @ change @ yiq * gain[:, None, None]                    # (B, 3, 3)
    luma = x.mean((2, 3)) @ yiq[0]                                       # (B,)
    offset = luma * brightness * (1 - contrast)
    pixels = x.flatten(2)                                                # (B, 3, h · w)
    return torch.baddbmm(offset[:, None, None], matrix, pixels).view_as(x).clamp_(0, 1)


# ---------------------------------------------------------------- the encoder

def convolution(d_in, d_out, stride=1):
    """3 × 3, padded by one pixel. It needs no bias, because a batch norm follows.

    At first, the first d_in of its d_out maps are copies of the input (Jordan 2024, "94% on
    CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498).
    """
    layer = nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[:d_in])
    return layer


class ResidualBlock(nn.Module):
    """(B, width, H, W) -> the same shape."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = convolution(width, width)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width)
        self.norm2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)                     # at first the block adds nothing

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(x + y)


class ImageEncoder(nn.Module):
    """Images (B, C, H, W), floats in [0, 1] -> features (B, 4 · width).

    H and W may be any number from 8 on. An image of 32 × 32 × 3 costs 49 million
    multiply-adds at width 64.

    The 4C numbers of each square of 2 × 2 pixels are whitened first, by a fixed matrix.

    Arguments: mean (C,), of the training pixels in [0, 1], and whitening (4C, 4C), both from
    data/images.py; they are stored with the weights. width, of the first feature map; the
    next two are twice and four times as wide. The shapes below are for width 64.
    """

    def __init__(self, mean, whitening, width=64):
        super().__init__()
        mean = torch.as_tensor(mean).float()
        whitening = torch.as_tensor(whitening).float()
        C = len(mean)
        self.register_buffer("mean", mean.view(C, 1, 1))
        self.register_buffer("whitening", whitening.view(4 * C, 4 * C, 1, 1))
        first, second, last = width, 2 * width, 4 * width
        self.to_second = nn.Sequential(                       # from (B, 4C, H/2, W/2)
            convolution(4 * C, first),                        # (B, 64, H/2, W/2)
            nn.BatchNorm2d(first),
            nn.ReLU(),
            convolution(first, second, stride=2),             # (B, 128, H/4, W/4)
            nn.BatchNorm2d(second),
            nn.ReLU(),
            ResidualBlock(second),
        )
        self.to_last = nn.Sequential(
            convolution(second, last, stride=2),              # (B, 256, H/8, W/8)
            nn.BatchNorm2d(last),
            nn.ReLU(),
            ResidualBlock(last),
        )

    def maps(self, x):
        """The last two feature maps: (B, 128, H/4, W/4) and (B, 256, H/8, W/8)."""
        x = x - self.mean
        H, W = x.shape[2:]
        x = F.pad(x, (0, W % 2, 0, H % 2), mode="replicate")  # to even sizes
        x = F.pixel_unshuffle(x, 2)                           # (B, 4C, H/2, W/2)
        with without_autocast(x.device):                      # whitening magnifies rounding errors
            x = F.conv2d(x, self.whitening)
        second = self.to_second(x)
        return second, self.to_last(second)

    def forward(self, x):
        _, last = self.maps(x)
        return last.mean((2, 3))                              # (B, 256)


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


def dense_head(d_in, d_out, hidden=2048):
    """The projection head, and BYOL's predictor: dense, batch norm, ReLU, dense."""
    return nn.Sequential(
        nn.Linear(d_in, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, d_out, bias=False),
    )


# ---------------------------------------------------------------- SimCLR

class SimCLR(nn.Module):
    """An encoder and a projection head.

    The projections themselves are no features, because the projection head learns to forget
    how the views differ (SimCLR, section 4.2).

    Arguments: mean, whitening and width as for ImageEncoder; columns D, of a projection.
    """

    def __init__(self, mean, whitening, width=64, columns=128):
        super().__init__()
        self.channels = len(mean)
        self.encoder = ImageEncoder(mean, whitening, width)
        self.projection_head = dense_head(4 * width, columns)

    def encode(self, x):
        """Images (B, C, H, W), floats in [0, 1] -> features (B, 20 · width + 2048).

        They are read at three depths, because none is the best for every number of labels:

            second map     (B, 128, H/4, W/4)   averaged over four horizontal strips
                ↓
            last map       (B, 256, H/8, W/8)   averaged over two strips,
                ↓                               and averaged over everything
            hidden layer   (B, 2048)            of the projection head

        The deeper a layer, the more abstract its numbers are. With few labels, abstract
        numbers serve best. With many labels, a classifier can also learn which pattern at
        which height belongs to which class. (Left and right are not told apart, because
        the training mirrors images.) Each part is scaled to length 1, so that none
        outweighs the others among nearest neighbours. EXPERIMENTS.md compares the parts
        ("Where should the features of an image be read?").

        The first 4 · width columns are the average of the last map, which is all that
        the papers read.

        Put the model into evaluation mode first, or the batch norms will move.
        """
        second, last = self.encoder.maps(x)
        average = last.mean((2, 3))                           # (B, 256)
        hidden = self.projection_head[:3](average)            # (B, 2048), after the ReLU
        parts = [average, mean_of_strips(last, 2), mean_of_strips(second, 4), hidden]
        return torch.cat([F.normalize(part.float(), dim=1) for part in parts], dim=1)

    def project(self, views):
        """Views (V, B, C, h, w) -> projections (V, B, D).

        Batch norm sees all VB views together.
        """
        V, B = views.shape[:2]
        features = self.encoder(views.flatten(0, 1))          # (VB, 4 · width)
        return self.projection_head(features).unflatten(0, (V, B))

    def forward(self, views):
        """What training calls: views (V, B, C, h, w) -> the projections, (V, B, D).

        BYOL returns more here. `project` is the same for both.
        """
        return self.project(views)


# ---------------------------------------------------------------- BYOL

class BYOL(SimCLR):
    """SimCLR's model with a predictor, and with a second network: the target."""

    def __init__(self, mean, whitening, width=64, columns=128):
        super().__init__(mean, whitening, width, columns)
        # This norm lets every column vary as much as every other.
        self.projection_head.append(nn.BatchNorm1d(columns, affine=False))
        self.predictor = dense_head(columns, columns)
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projection_head))
        self.target.requires_grad_(False)

    def forward(self, views):
        """Views (V, B, C, h, w) -> predictions and targets for `byol_loss`, both (V, B, D).

        predictions[v] shall be near targets[w] for every other view w of the same image.
        """
        projections = self.project(views)
        predictions = self.predictor(projections.flatten(0, 1)).view_as(projections)
        return predictions, self.project_by_target(views)

    @torch.no_grad()
    def project_by_target(self, views):
        """Views (V, B, C, h, w) -> projections of the target network, (V, B, D)."""
        V, B = views.shape[:2]
        return self.target(views.flatten(0, 1)).unflatten(0, (V, B))

    @torch.no_grad()
    def update_target(self, rate):
        """target ← rate · target + (1 − rate) · (encoder and projection head).

        Only the parameters move. The target is used in training alone, where batch norm
        takes its statistics from the batch.
        """
        online = nn.Sequential(self.encoder, self.projection_head)
        for old, new in zip(self.target.parameters(), online.parameters(), strict=True):
            old.lerp_(new, 1 - rate)


def target_rate(step, steps, start):
    """The rate of `update_target` at one step. It rises from `start` to 1 along a cosine.

    Grill et al. 2020, section 3.3.

    >>> [round(target_rate(step, 4, 0.98), 3) for step in range(4)]
    [0.98, 0.983, 0.99, 0.997]
    """
    falling = (1 + math.cos(math.pi * step / steps)) / 2      # from 1 to 0
    return 1 - (1 - start) * falling
