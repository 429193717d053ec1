"""Shapes: pictures of ten classes, drawn by our own code, so that no download is needed.

Each picture shows one shape in one colour before a soft background. Place, size, rotation and
colours vary freely, so the pixels do not give the class away: an encoder has to learn what an
outline is. Logistic regression on the pixels stays near chance, which is 10 %
(tests/test_shapes.py).

An outline is a signed distance: a function of a point (x, y) that is negative inside the shape,
0 on its outline and positive outside. One formula then fills a shape, smooths its border and
combines two shapes:

    union of a and b             minimum(a, b)
    a without b                  maximum(a, -b)
    the border of a, 2 w wide    |a| - w

These rules keep the outline exact. Away from it the value may be smaller than the true
distance. The technique is described in Hart, "Sphere tracing" (The Visual Computer, 1996).

The drawing code also tells what it drew, and `write_captions` puts that into words, for
examples/clip.py.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from minissl.data.batches import generator
from minissl.data.splits import HELD_OUT, TEST, TRAIN
from minissl.training.files import progress


# ---------------------------------------------------------------- Outlines
# Each function takes the coordinates of points: two tensors x and y of the same size, in units
# of the shape's radius. Every outline fits into the unit circle around (0, 0), apart from
# corners that stand out by up to 8 %.

def box(x, y, width, height):
    """Signed distance to a rectangle from -width to width and from -height to height."""
    return torch.maximum(x.abs() - width, y.abs() - height)


def star_with(points, x, y, inner):
    """Signed distance to a star whose tips have radius 1 and whose notches have radius `inner`.

    A star of `points` tips consists of 2 * points equal sectors, each the mirror image of the
    next. Folding the plane into one sector leaves one straight edge, from the tip (1, 0) to the
    notch at the sector's other side.
    """
    sector = math.pi / points
    radius = torch.hypot(x, y)
    angle = torch.atan2(y, x) % (2 * sector)
    angle = (angle - sector).abs() - sector            # 0 at the tip, -sector at the notch
    edge_x = 1 - inner * math.cos(sector)
    edge_y = inner * math.sin(sector)
    along = radius * angle.cos() - 1
    across = radius * angle.sin()
    return (along * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)


def circle(x, y):
    return torch.hypot(x, y) - 0.8


def square(x, y):
    return box(x, y, 0.72, 0.72)


def triangle(x, y):
    return star_with(3, x, y, inner=0.5)               # at 0.5 the edges of a star are straight


def star(x, y):
    return star_with(5, x, y, inner=0.42)


def cross(x, y):
    return torch.minimum(box(x, y, 1, 0.28), box(x, y, 0.28, 1))


def ring(x, y):
    return (torch.hypot(x, y) - 0.65).abs() - 0.2


def frame(x, y):
    return box(x, y, 0.58, 0.58).abs() - 0.18


def crescent(x, y):
    disc = torch.hypot(x, y) - 0.95
    bite = torch.hypot(x - 0.45, y) - 0.75
    return torch.maximum(disc, -bite)


def bar(x, y):
    return box(x, y, 1, 0.27)


def half_disc(x, y):
    disc = torch.hypot(x, y) - 0.95
    return torch.maximum(disc, -x - 0.1)


# The order fixes the class numbers.
OUTLINES = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "ring": ring,
    "frame": frame,
    "crescent": crescent,
    "bar": bar,
    "half disc": half_disc,
}
SHAPES = list(OUTLINES)


def distance(shape, x, y):
    """Signed distance of the points (x, y) to the outline of a shape, negative inside.

    shape: one of SHAPES. x, y and the result are tensors of the same size.
    """
    return OUTLINES[shape](x, y)


# ---------------------------------------------------------------- Pictures

@dataclass
class Drawn:
    """What was drawn: of each of n pictures its class, colour, size and place."""
    labels: torch.Tensor             # (n,) int64, numbers in SHAPES
    colour: torch.Tensor             # (n, 3): red, green and blue in [0, 1]
    radius: torch.Tensor             # (n,), as a share of the picture's side
    centre: torch.Tensor             # (n, 2): x and y, likewise; (0, 0) is the upper left corner


def draw_shapes(n, rng, size=32):
    """Draw n pictures -> (n, 3, size, size) uint8, and what was Drawn.

    Every quantity is drawn from `rng`, a torch.Generator, for each picture separately. Lengths
    inside this function are in pixels; in Drawn they are shares of the picture's side.
    """
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=rng)

    def textured(colour, strength):
        """A colour (n, 3, 1, 1) with soft spots on it -> (n, 3, size, size)."""
        noise = torch.randn(n, 3, 5, 5, generator=rng)
        spots = colour + noise * uniform(0, strength, 1, 1, 1)
        return F.interpolate(spots, (size, size), mode="bilinear", align_corners=True)

    column = torch.arange(size) + 0.5                  # the middles of the pixels
    row = column[:, None]

    # The shape: its class, size, rotation and place. Its centre keeps a radius from the border.
    labels = torch.randint(len(SHAPES), (n,), generator=rng)
    radius = uniform(0.2, 0.42, 1, 1) * size
    turn = uniform(0, 2 * math.pi, 1, 1)
    room = size - 2 * radius
    share_x, share_y = uniform(0, 1, 1, 1), uniform(0, 1, 1, 1)
    x = column.expand(size, size) - radius - share_x * room
    y = row.expand(size, size) - radius - share_y * room
    along = (x * turn.cos() + y * turn.sin()) / radius
    across = (y * turn.cos() - x * turn.sin()) / radius
    outline = torch.empty(n, size, size)
    for number, name in enumerate(SHAPES):
        chosen = labels == number
        outline[chosen] = distance(name, along[chosen], across[chosen])
    # 1 inside, 0 outside, and in between over one pixel at the border.
    inside = (0.5 - outline * radius).clamp_(0, 1)[:, None]

    # The background: a tinted grey with soft spots and faint stripes.
    grey = uniform(0.1, 0.9, 1, 1, 1)
    tint = uniform(-0.1, 0.1, 3, 1, 1)
    picture = textured(grey + tint, 0.08)
    angle = uniform(0, 2 * math.pi, 1, 1)
    position = column * angle.cos() + row * angle.sin()
    stripes = (position * uniform(0.2, 1.2, 1, 1)).sin_()
    picture += (stripes * uniform(0, 0.06, 1, 1))[:, None]

    # The ink: if no channel differs from the background's grey by 0.35, all channels are pushed
    # away from it by 0.5. Values outside of [0, 1] are cut off at the end. So in 0.9 % of the
    # pictures the difference stays below 0.35, and in 0.1 % below 0.2.
    colour = uniform(0, 1, 3, 1, 1)
    contrast = colour - grey
    too_close = contrast.abs().amax(1, keepdim=True) < 0.35
    colour += torch.where(too_close, 0.5 * contrast.sign(), 0.0)
    ink = textured(colour, 0.08)

    # Three small discs that have nothing to do with the class.
    for _ in range(3):
        dx = column - uniform(0, size, 1, 1)
        dy = row - uniform(0, size, 1, 1)
        disc_radius = uniform(0.5, 2.5, 1, 1)
        disc = (0.5 + disc_radius - torch.hypot(dx, dy)).clamp_(0, 1)[:, None]
        disc_colour = uniform(0, 1, 3, 1, 1)
        picture.lerp_(disc_colour.expand_as(picture), disc.expand_as(picture))

    # The shape covers the discs, and noise covers everything.
    picture.lerp_(ink, inside.expand_as(picture))
    picture += 0.03 * torch.randn(picture.shape, generator=rng)
    pixels = (picture.clamp_(0, 1) * 255).round_().to(torch.uint8)
    centre = torch.cat([radius + share_x * room, radius + share_y * room], dim=1)     # (n, 2, 1)
    drawn = Drawn(labels, colour.clamp(0, 1).flatten(1), radius.flatten() / size,
                  centre.flatten(1) / size)
    return pixels, drawn


def shape_data(limit=0):
    """The data set: 45,000 training, 5,000 held-out and 10,000 test pictures, always the same.

    limit: draw only this many for each split (0: all). Returns pixels (N, 3, 32, 32) uint8 as a
    tensor, labels (N,) int64 and split (N,) uint8 as arrays.
    """
    pixels, drawn, split = shape_data_and_tell(limit)
    return pixels, drawn.labels.numpy(), split


def shape_data_and_tell(limit=0):
    """The data set as `shape_data` has it: pixels, what was Drawn, and the split."""
    splits = [TRAIN, HELD_OUT, TEST]
    sizes = [45_000, 5_000, 10_000]
    if limit:
        sizes = [min(limit, size) for size in sizes]
    total = sum(sizes)
    pixels, parts = [], []
    for split, size in zip(splits, sizes):
        for begin in range(0, size, 1000):
            done = sum(len(pictures) for pictures in pixels)
            progress(f"shapes: {done:,} of {total:,} drawn")
            n = min(1000, size - begin)
            pictures, drawn = draw_shapes(n, generator(0, f"shapes {split}", begin))
            pixels.append(pictures)
            parts.append(drawn)
    drawn = {}
    for name in ("labels", "colour", "radius", "centre"):
        drawn[name] = torch.cat([getattr(part, name) for part in parts])
    split = np.repeat(np.uint8(splits), sizes)
    return torch.cat(pixels), Drawn(**drawn), split


# ---------------------------------------------------------------- Captions

COLOURS = ["grey", "blue", "green", "turquoise", "red", "pink", "yellow"]
SIZES = ["small", "medium-sized", "large"]
PLACES = [
    "upper left", "top", "upper right",
    "left", "middle", "right",
    "lower left", "bottom", "lower right",
]


def name_traits(drawn):
    """What was Drawn, by name: (n, 4) int64, numbers in SHAPES, COLOURS, SIZES and PLACES.

    Colour: a channel is on if it is nearer to the strongest channel than to the weakest. Red and
    green on give yellow, for example. If all channels lie within 0.2, the colour is grey.
    Size: a third of the radii for each name.
    Place: from left to right, a centre within 0.08 of the picture's middle is in the middle;
    from top to bottom likewise.
    """
    low = drawn.colour.amin(1, keepdim=True)
    high = drawn.colour.amax(1, keepdim=True)
    is_on = drawn.colour > (low + high) / 2                               # (n, 3)
    # 1 blue, 2 green, 3 both (turquoise), 4 red, 5 red and blue (pink), 6 red and green (yellow).
    # The weakest channel is never on, so there is no 7.
    red, green, blue = is_on.long().unbind(1)
    colour = 4 * red + 2 * green + blue                                   # (n,), 1 to 6
    is_grey = (high - low)[:, 0] < 0.2
    colour = colour.masked_fill(is_grey, 0)
    size = torch.bucketize(drawn.radius, torch.tensor([0.273, 0.347]))
    column, row = torch.bucketize(drawn.centre, torch.tensor([0.42, 0.58])).unbind(1)
    return torch.stack([drawn.labels, colour, size, 3 * row + column], dim=1)


SIZE_WORDS = {
    "small": ["small", "little", "tiny"],
    "medium-sized": ["medium-sized", "medium"],
    "large": ["large", "big", "huge"],
}
PLACE_WORDS = {
    "top": ["at the top", "near the upper edge"],
    "left": ["on the left", "near the left edge"],
    "middle": ["in the middle", "in the centre"],
    "right": ["on the right", "near the right edge"],
    "bottom": ["at the bottom", "near the lower edge"],
}
SENTENCES = [
    "a {size} {colour} {shape} {place}",
    "{place} there is a {size} {colour} {shape}",
    "the {shape} {place} is {size} and {colour}",
    "{place} we see a {colour} {shape}, and it is {size}",
    "a {colour} {shape} lies {place}, a {size} one",
]


def write_captions(traits, seed=0):
    """A caption for each row of traits (n, 4), in varied wording: a list of n strings.

    The wording comes from `seed` alone, so it tells nothing about the picture.
    """
    rng = random.Random(seed)
    captions = []
    for shape, colour, size, place in traits.tolist():
        place = PLACES[place]
        places = PLACE_WORDS.get(place, [f"in the {place}", f"in the {place} corner"])
        caption = rng.choice(SENTENCES).format(
            shape=SHAPES[shape],
            colour=COLOURS[colour],
            size=rng.choice(SIZE_WORDS[SIZES[size]]),
            place=rng.choice(places),
        )
        captions.append(caption)
    return captions
