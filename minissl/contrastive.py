"""A convolutional encoder that learns from images without labels, by recognising two views of one image.

**SimCLR.** Distort each of B images V times at random, encode, project: z (V, B, D). A view should be found by the
other views of its image among all views of the batch. For each anchor i and each of its V − 1 positives p,

    L_{i,p} = −log( exp(s_ip) / Σ_{j ≠ i} exp(s_ij) )         s_ij = 1/τ · the cosine of z_i and z_j (or z_i · z_j)

and InfoNCE is the mean over all i and p. The matrix s for V = 2, B = 3, rows the anchors:

               view 0       view 1
             a   b   c    a   b   c
          a  .   −   −    +   −   −        .  self: in no sum, and no gradient
  view 0  b  −   .   −    −   +   −        +  positive: another view of the same image
          c  −   −   .    −   −   +        −  negative: any view of another image
          a  +   −   −    .   −   −
  view 1  b  −   +   −    −   .   −        Each row is a classification of VB − 1 candidates, so a collapsed encoder
          c  −   −   +    −   −   .        (all z alike) has the loss ln(VB − 1): the chance level in the log.

**BYOL** has no negatives. A predictor on top of the projection of one view predicts the projection of the other view
as a second network sees it, the target, a slow moving average of the first, which takes no gradient:

    L = mean ‖q/‖q‖ − z'/‖z'‖‖²    q = predictor(z),  z' of the target;    target ← r · target + (1 − r) · encoder

Nothing in the loss forbids that all z be alike or, with our batch norm behind them, that all lie on a line. After 300
steps the effective rank of the projections is 44; without the predictor 10, without stop-gradient and target 2
(EXPERIMENTS.md, "What else BYOL needs").

    Chen et al. 2020, "SimCLR", arXiv 2002.05709           two views, projection head, NT-Xent
    van den Oord et al. 2018, arXiv 1807.03748             InfoNCE
    Khosla et al. 2020, arXiv 2004.11362, equation 2       several positives: one logarithm each, not one of their sum
    Grill et al. 2020, "BYOL", arXiv 2006.07733

Differences from the papers, all for two CPU cores and 32 × 32 pixels:
- A ResNet of 2 residual blocks that sees 2 × 2 pixels as one with 12 channels. Views have three quarters of the image's
  height and width, 1.8 times the images a second, and the probe reads whole images (the train-test resolution trick).
- No blur: at this size it takes away what there is to see. Colours are changed by one affine map an image, without
  rounding in between: `augment` says how.
- Muon instead of LARS (train_contrastive.py), batches of 256 instead of 4,096.
- BYOL's projections end with a batch norm, as those of SimSiam (Chen and He 2020, arXiv 2011.10566, section 3).

This file needs torch alone. Shapes: V views, B images, C channels, H × W pixels, D columns. Read next:
train_contrastive.py.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- losses

def info_nce(views, temperature=0.5, similarity="cosine"):
    """The mean over anchors and their positives of −log softmax over all other views; see the drawing above.

    Arguments: views (V, B, D), V ≥ 2, any float type (the log-sum-exp is float32 or better); temperature τ > 0;
    similarity, "cosine" or "dot".
    Returns a scalar; ln(VB − 1) for identical embeddings. With V = 2 and cosine it is NT-Xent, SimCLR's equation 1.
    Raises ValueError for one view, nothing to tell apart, another similarity, or a temperature that is not above 0.
    """
    V, B, _ = views.shape
    if V < 2 or B < 2 or not temperature > 0 or similarity not in ("cosine", "dot"):
        raise ValueError(f"info_nce needs at least 2 views of 2 samples, a temperature above 0 and similarity cosine "
                         f"or dot; found {V} views, {B} samples, temperature {temperature}, similarity {similarity!r}")
    z = views.flatten(0, 1)                                                   # (VB, D), view by view
    z = z if z.dtype == torch.float64 else z.float()
    if similarity == "cosine":
        z = F.normalize(z, dim=1)
    with torch.autocast(z.device.type, enabled=False):
        s = z @ z.T / temperature                                             # (VB, VB)
    # The trap: to subtract exp(s_ii) from the sum as a constant gives the right value and, with the dot product, a
    # wrong gradient, for s_ii grows with z_i's length. (With the cosine it is 1/τ always.) At −∞ it adds to neither.
    itself = torch.eye(V * B, dtype=torch.bool, device=z.device)
    total = s.masked_fill(itself, float("-inf")).logsumexp(1).view(V, 1, B)   # of anchor (v, b)
    same_image = s.view(V, B, V, B).diagonal(dim1=1, dim2=3)                  # (V, V, B): anchor (v, b) and view w of b
    another_view = ~torch.eye(V, dtype=torch.bool, device=z.device)           # (V, V)
    return (total - same_image)[another_view].mean()


def byol_loss(prediction, target):
    """‖q/‖q‖ − z/‖z‖‖² = 2 − 2 cos(q, z), the mean over the batch; no gradient reaches the target.

    prediction q, target z: both (B, D). Returns a scalar from 0 to 4. Source: Grill et al. 2020, equation 2.
    """
    q, z = (t if t.dtype == torch.float64 else t.float() for t in (prediction, target.detach()))
    return (2 - 2 * F.cosine_similarity(q, z, dim=-1)).mean()


# ---------------------------------------------------------------- what the loss does not show

def alignment(views):
    """Mean squared distance of two normalised views of an image, (V, B, D), V ≥ 2: 0 is best. (arXiv 2005.10242)"""
    a, b = F.normalize(views[:2].float(), dim=-1)
    return (a - b).square().sum(-1).mean()


def uniformity(z):
    """log mean exp(−2 ‖z_i − z_j‖²) over pairs of normalised rows (B, D): 0 collapsed, about −4 spread out. (ibid.)"""
    return (torch.pdist(F.normalize(z.float(), dim=-1)).square() * -2).exp().mean().log()


def effective_rank(z):
    """exp(entropy of the normalised singular values) of the centred rows of z (B, D): how many directions are in use.
    Roy and Vetterli 2007. Of the projections it falls first when an encoder collapses."""
    share = torch.linalg.svdvals(z.float() - z.float().mean(0))
    share = share / share.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()


# ---------------------------------------------------------------- views

def augment(images, size, numbers, crop=0.2, jitter=0.4, hue=0.1, grey=0.2, flip=True):
    """A distorted view of each image, each with its own draw: a random crop, mirrored or not, in other colours.

    Arguments: images (B, C, H, W) uint8 or float in [0, 255], C 1 or 3; size (h, w) of the views; numbers (B, 12),
    uniform in [0, 1), all the chance there is (the last is left over); crop, the least share of the area; jitter, the
    strength of brightness, contrast and saturation; hue, in turns; grey, the share of views without colour; flip,
    whether mirroring is allowed.
    Returns (B, C, h, w) float32 in [0, 1].

    Crop and mirror are one affine map of the pixel grid, the colours one affine map of the colour space, so a view
    costs one resampling and one 3 × 3 product. Unlike torchvision's, colours are not clamped between the steps, the
    steps have a fixed order, and a crop that would stick out of the image is narrowed instead of drawn again: with
    `crop` above 0.75 a view can hold somewhat less than that share.
    """
    return recolour(crop_and_flip(images, size, numbers[:, :5], crop, flip), numbers[:, 5:], jitter, hue, grey)


def crop_and_flip(images, size, numbers, crop, flip):
    """Random resized crop of `crop` to 1 of the area, aspect ratio 3/4 to 4/3, and a mirroring for half of the images.
    numbers (B, 5). Bilinear, as F.grid_sample(align_corners=False). Returns float32 in [0, 1]."""
    area = crop + (1 - crop) * numbers[:, 0]
    ratio = (math.log(4 / 3) * (2 * numbers[:, 1] - 1)).exp().sqrt()
    width, height = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)     # of the image's, (B,)
    x, y = (1 - width) * (2 * numbers[:, 2] - 1), (1 - height) * (2 * numbers[:, 3] - 1)       # the centre, in [−1, 1]
    mirror = torch.where(numbers[:, 4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(x)
    zero = torch.zeros_like(x)
    theta = torch.stack([width * mirror, zero, x, zero, height, y], dim=1).view(-1, 2, 3)
    where = F.affine_grid(theta, [len(images), images.shape[1], *size], align_corners=False)   # (B, h, w, 2)
    return F.grid_sample(images.float() / 255, where, padding_mode="border", align_corners=False)


# Luma and two colour axes (NTSC's YIQ): hue is the angle in the plane of the colour axes, saturation the radius.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
RGB = torch.linalg.inv(YIQ)


def recolour(x, numbers, jitter, hue, grey):
    """Brightness, contrast, saturation and hue for 80 % of the images, then no colour for the share `grey`.

    x (B, C, h, w) in [0, 1]; numbers (B, 7). brightness: x · b; contrast: m + c (x − m), m the mean luma; saturation
    scales, hue turns the colour axes. b, c and saturation in 1 ± jitter, hue in ± `hue` turns. Clamped at the end.
    """
    change = (numbers[:, 0] < 0.8).float()                                    # (B,)
    brightness, contrast, saturation = 1 + jitter * change * (2 * numbers[:, 1:4].T - 1)
    if x.shape[1] == 1:
        gain, mean = (brightness * contrast)[:, None, None, None], x.mean((1, 2, 3), keepdim=True)
        return (x * gain + ((1 - contrast) * brightness)[:, None, None, None] * mean).clamp(0, 1)
    turn = 2 * math.pi * hue * change * (2 * numbers[:, 4] - 1)
    saturation = saturation * (numbers[:, 5] >= grey)
    cos, sin, zero = saturation * turn.cos(), saturation * turn.sin(), torch.zeros_like(turn)
    plane = torch.stack([torch.ones_like(turn), zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    yiq = YIQ.to(x.device)
    colours = RGB.to(x.device) @ plane @ yiq * (brightness * contrast)[:, None, None]     # (B, 3, 3)
    mean = (x.mean((2, 3)) @ yiq[0]) * brightness * (1 - contrast)            # (B,): grey stays grey under `plane`
    return torch.baddbmm(mean[:, None, None], colours, x.flatten(2)).view_as(x).clamp_(0, 1)


# ---------------------------------------------------------------- the encoder

class Convolution(nn.Conv2d):
    """3 × 3, with a margin of one zero; batch norm, which follows, has the bias.

    In bfloat16 on a CPU the images of a batch are laid side by side in a few wide ones, with zeros between them. The
    sums are the same; but the library takes the weights' gradient image by image, and with maps of 3 × 3 that alone
    was half of a step.
    """

    def __init__(self, d_in, d_out, stride=1):
        super().__init__(d_in, d_out, 3, stride=stride, padding=1, bias=False)

    def forward(self, x):
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().forward(x)
        # Behind each image stand one or two zero columns, so that its width, and so its place in the wide image, is a
        # multiple of the stride; of its outputs the first W' = ⌈W / stride⌉ are its own, the rest are the zeros'.
        (B, _, _, W), stride = x.shape, self.stride[0]
        x = F.pad(x, (0, stride - W % stride)).permute(0, 2, 3, 1)            # (B, H, W + 1, C), or W + 2
        x = x.unflatten(0, (math.gcd(B, 8), -1)).transpose(1, 2)              # (8, H, B/8, W + 1, C)
        y = super().forward(x.flatten(2, 3).permute(0, 3, 1, 2))              # (8, C', H', B/8 (W + 1) / stride)
        y = y.permute(0, 2, 3, 1).unflatten(2, (x.shape[2], -1)).transpose(1, 2)    # (8, B/8, H', (W + 1) / stride, C')
        return y[:, :, :, :-(-W // stride)].flatten(0, 1).permute(0, 3, 1, 2)       # (B, C', H', W')


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = Convolution(width, width)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = Convolution(width, width)
        self.norm2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)                                     # at first the block does nothing

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ImageEncoder(nn.Module):
    """Images (B, C, H, W), floats in [0, 1], any H and W of at least 8 -> features (B, 4 · width).

    49 million multiply-adds for 32 × 32 × 3. mean, deviation (C,): of the pixels in [0, 1] that it learned from; the
    scaling travels with the weights. width: of the first feature map (the shapes below are for 64), doubled twice.
    """

    def __init__(self, mean, deviation, width=64):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean).float().view(-1, 1, 1))
        self.register_buffer("deviation", torch.as_tensor(deviation).float().view(-1, 1, 1))
        C, first, second, last = len(self.mean), width, 2 * width, 4 * width
        self.layers = nn.Sequential(
            Convolution(4 * C, first), nn.BatchNorm2d(first), nn.ReLU(),
            Convolution(first, second, stride=2), nn.BatchNorm2d(second), nn.ReLU(), ResidualBlock(second),
            Convolution(second, last, stride=2), nn.BatchNorm2d(last), nn.ReLU(), ResidualBlock(last))

    def forward(self, x):
        x = (x - self.mean) / self.deviation
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
        x = F.pixel_unshuffle(x, 2)                                           # (B, 4C, H/2, W/2)
        x = self.layers(x.contiguous(memory_format=torch.channels_last))      # (B, 256, H/8, W/8)
        return x.mean((2, 3))


def head(d_in, hidden, d_out):
    """SimCLR's projection head and BYOL's predictor: dense, batch norm, ReLU, dense."""
    return nn.Sequential(nn.Linear(d_in, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, d_out, bias=False))


class ContrastiveModel(nn.Module):
    """Encoder and projection head; for BYOL also the predictor, and the target: a second encoder and head.

    Features are taken before the projection head, which learns to forget how the views differ (SimCLR, section 4.2).
    """

    def __init__(self, mean, deviation, byol=False, width=64, columns=128):
        super().__init__()
        self.channels, self.encoder = len(mean), ImageEncoder(mean, deviation, width)
        self.projection_head = head(4 * width, 512, columns)
        self.predictor = self.target = None
        if byol:     # each number of a target varies as much as every other: +4 points after 300 steps, +½ after 2,100
            self.projection_head.append(nn.BatchNorm1d(columns, affine=False))
            self.predictor = head(columns, 512, columns)
            self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projection_head)).requires_grad_(False)
            for module in self.target.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module.momentum = 0.0          # it norms by the batch, but its buffers move with the average alone

    def encode(self, x):
        """Images (B, C, H, W), floats in [0, 1] -> (B, 4 · width). In evaluation mode, or batch norm moves."""
        return self.encoder(x)

    def project(self, views):
        """Views (V, B, C, h, w) -> projections (V, B, D); batch norm sees all VB of them."""
        return self.projection_head(self.encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])

    def predict(self, projections):
        """(V, B, D) -> what the target should say of another view of each image, (V, B, D)."""
        return self.predictor(projections.flatten(0, 1)).view_as(projections)

    @torch.no_grad()
    def project_by_target(self, views):
        return self.target(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    @torch.no_grad()
    def update_target(self, rate):
        """target ← rate · target + (1 − rate) · encoder, parameters and running statistics alike."""
        online = nn.Sequential(self.encoder, self.projection_head)
        for old, new in zip(self.target.state_dict().values(), online.state_dict().values()):
            old.lerp_(new, 1 - rate) if old.is_floating_point() else old.copy_(new)
