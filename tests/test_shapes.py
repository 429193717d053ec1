"""The drawn shapes: their outlines, their placement, and that pixels do not give them away."""

import numpy as np
import pytest
import torch

from minissl.data import shapes
from minissl.data.batches import generator
from minissl.data.splits import HELD_OUT, TEST, TRAIN
from minissl.evaluation import probes


# ---------------------------------------------------------------- The data set

def test_shapes_are_the_same_each_time_and_all_differ():
    pixels, labels, split = shapes.shape_data(limit=40)
    again, labels_again, _ = shapes.shape_data(limit=40)
    assert torch.equal(pixels, again) and (labels == labels_again).all()
    assert pixels.shape == (120, 3, 32, 32) and pixels.dtype == torch.uint8
    assert [int((split == s).sum()) for s in (TRAIN, HELD_OUT, TEST)] == [40, 40, 40]
    assert len({image.numpy().tobytes() for image in pixels}) == 120
    assert set(labels) == set(range(10))


def test_no_thousand_of_shapes_is_drawn_twice(monkeypatch):
    seeds = []

    def draw_nothing(n, generator):
        seeds.append(generator.initial_seed())
        drawn = shapes.Drawn(
            torch.zeros(n, dtype=torch.int64), torch.zeros(n, 3), torch.zeros(n), torch.zeros(n, 2))
        return torch.zeros(n, 3, 2, 2, dtype=torch.uint8), drawn

    monkeypatch.setattr(shapes, "draw_shapes", draw_nothing)
    pixels, labels, split = shapes.shape_data()
    assert pixels.shape == (60_000, 3, 2, 2) and labels.shape == split.shape == (60_000,)
    assert len(seeds) == 60 and len(set(seeds)) == 60
    assert np.bincount(split).tolist() == [45_000, 5_000, 10_000]


def test_the_pixels_of_a_seed_stay_the_same():
    """Other results rest on these pictures. Another processor may round differently by 1."""
    pictures, drawn = shapes.draw_shapes(3, generator(0, "test", 0))
    assert drawn.labels.tolist() == [8, 8, 4]
    expected = torch.tensor([
        [159, 166, 175, 159, 154, 162, 173, 170, 141, 139, 138, 115],
        [122, 141, 139, 137, 115, 99, 86, 96, 142, 131, 118, 125],
        [192, 202, 200, 198, 223, 213, 218, 212, 196, 197, 196, 190],
    ])
    found = pictures[:, :, 4::8, 4::8].flatten(1)[:, ::4].long()
    assert (found - expected).abs().max() <= 1


def test_pixels_do_not_give_the_shape_away():
    pixels, labels, split = shapes.shape_data(limit=1500)
    x = pixels.flatten(1).float() / 255 - 0.5
    train, test = np.flatnonzero(split == TRAIN), np.flatnonzero(split == TEST)
    weights = probes.logistic_regression(x[train], labels[train], 10, 0.3)
    predicted = probes.linear_logits(x[test], weights).argmax(1)
    assert probes.accuracy(predicted, labels[test]) < 20           # chance: 10


# ---------------------------------------------------------------- Outlines

def distance_at(shape, x, y):
    return float(shapes.distance(shape, torch.tensor([x]), torch.tensor([y]))[0])


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_the_distance_is_negative_inside(shape):
    middle_is_empty = {"ring": (0.65, 0.0), "frame": (0.58, 0.0), "crescent": (-0.6, 0.0)}
    inside = middle_is_empty.get(shape, (0.0, 0.0))
    assert distance_at(shape, *inside) < 0
    assert distance_at(shape, 1.5, 1.5) > 0


def test_outlines_lie_where_geometry_has_them():
    assert distance_at("circle", 0.3, 0.0) == pytest.approx(-0.5)
    assert distance_at("square", 0.0, 0.72) == pytest.approx(0)
    assert distance_at("cross", 0.9, 0.28) == pytest.approx(0, abs=1e-6)
    assert distance_at("ring", 0.0, 0.0) > 0
    assert distance_at("frame", 0.0, 0.0) > 0


def test_a_triangle_has_corners_at_1_and_edges_at_a_half():
    for n in range(6):
        angle = n * np.pi / 3
        radius = 1.0 if n % 2 == 0 else 0.5
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        assert distance_at("triangle", x, y) == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------- Pictures

def test_a_shape_is_turned_not_sheared_and_inside(monkeypatch):
    places = []

    def record(shape, x, y):
        places.append((x, y))
        return x

    monkeypatch.setattr(shapes, "distance", record)
    shapes.draw_shapes(100, generator(0, "test", 0))
    along = torch.cat([x for x, y in places])          # (100, 32, 32), in units of the radius
    across = torch.cat([y for x, y in places])

    def slope(z):                                      # by one pixel to the right, and down
        return torch.stack([z[:, 0, 1] - z[:, 0, 0], z[:, 1, 0] - z[:, 0, 0]])

    u, v = slope(along), slope(across)
    torch.testing.assert_close(v, torch.stack([-u[1], u[0]]), rtol=0, atol=1e-5)

    radius = 1 / u.norm(dim=0)                         # in pixels
    assert 6 < radius.min() < radius.max() < 14
    from_centre = torch.hypot(along, across)
    from_centre[:, 1:-1, 1:-1] = 99                    # leaves the pixels at the border
    nearest = from_centre.amin((1, 2)) * radius
    assert (nearest > radius - 0.51).all()             # their middles are half a pixel inside


def test_a_shape_stands_out_from_its_background(monkeypatch):
    left = torch.where(torch.arange(32) < 16, -9.0, 9.0)       # the left half is the shape
    monkeypatch.setattr(shapes, "distance", lambda shape, x, y: left.expand_as(x))
    pictures, _ = shapes.draw_shapes(500, generator(0, "test", 0))
    halves = pictures.float().split(16, dim=3)
    ink, background = [half.flatten(2).median(2).values / 255 for half in halves]       # (500, 3)
    contrast = (ink - background).abs().amax(1)
    assert (contrast > 0.25).float().mean() > 0.97


# ---------------------------------------------------------------- Captions

SYMMETRIC = ("circle", "square", "star", "cross", "ring", "frame", "bar")


def draw_with_masks(n, monkeypatch):
    """Pictures, what was drawn, and masks (n, size, size) of the pixels that the shape covers.

    The same pictures are drawn again with nothing inside the outlines. Where the two differ,
    there is the shape.
    """
    pictures, drawn = shapes.draw_shapes(n, generator(0, "masks", 0), size=64)
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "distance", lambda shape, x, y: torch.full_like(x, 9))
        empty, _ = shapes.draw_shapes(n, generator(0, "masks", 0), size=64)
    difference = (pictures.float() - empty.float()).abs().amax(1)         # (n, 64, 64)
    return pictures, drawn, difference > 25


def test_what_is_told_is_what_the_pixels_show(monkeypatch):
    """Place, size and colour, measured in the pictures and named by the same rules."""
    pictures, drawn, masks = draw_with_masks(600, monkeypatch)
    middles = (torch.arange(64) + 0.5) / 64
    area = masks.float().mean((1, 2))
    x = masks.float().mean(1) @ middles / (64 * area)
    y = masks.float().mean(2) @ middles / (64 * area)
    colour = torch.zeros(600, 3)
    for n in range(600):
        colour[n] = pictures[n][:, masks[n]].float().median(1).values / 255

    is_symmetric = np.isin(drawn.labels, [shapes.SHAPES.index(name) for name in SYMMETRIC])
    assert (x - drawn.centre[:, 0]).abs()[is_symmetric].max() < 0.02
    assert (y - drawn.centre[:, 1]).abs()[is_symmetric].max() < 0.02

    circles = drawn.labels == shapes.SHAPES.index("circle")
    radius = (area / np.pi).sqrt() / 0.8
    assert (radius - drawn.radius).abs()[circles].max() < 0.01

    measured = shapes.Drawn(drawn.labels, colour, radius, torch.stack([x, y], dim=1))
    told, seen = shapes.name_traits(drawn), shapes.name_traits(measured)
    agree = (told == seen).float()
    assert agree[:, 1].mean() > 0.95                           # colours near a border differ
    assert agree[circles, 2].mean() > 0.93
    assert agree[is_symmetric, 3].mean() > 0.95


def drawn_as(colour=(1, 0, 0), radius=0.3, centre=(0.5, 0.5)):
    return shapes.Drawn(
        torch.tensor([3]), torch.tensor([colour]), torch.tensor([radius]), torch.tensor([centre]))


@pytest.mark.parametrize("colour, name", [
    ((0.9, 0.2, 0.1), "red"), ((0.9, 0.8, 0.1), "yellow"), ((0.1, 0.6, 0.2), "green"),
    ((0.1, 0.9, 0.8), "turquoise"), ((0.2, 0.1, 0.7), "blue"), ((0.9, 0.3, 0.8), "pink"),
    ((0.9, 0.9, 0.8), "grey"), ((0.1, 0.0, 0.1), "grey"),
])
def test_colours_have_their_names(colour, name):
    traits = shapes.name_traits(drawn_as(colour=colour))
    assert shapes.COLOURS[traits[0, 1]] == name


@pytest.mark.parametrize("radius, name", [
    (0.21, "small"), (0.27, "small"), (0.28, "medium-sized"), (0.34, "medium-sized"),
    (0.35, "large"), (0.41, "large"),
])
def test_sizes_have_their_names(radius, name):
    traits = shapes.name_traits(drawn_as(radius=radius))
    assert shapes.SIZES[traits[0, 2]] == name


@pytest.mark.parametrize("centre, name", [
    ((0.2, 0.2), "upper left"), ((0.5, 0.2), "top"), ((0.8, 0.2), "upper right"),
    ((0.2, 0.5), "left"), ((0.5, 0.5), "middle"), ((0.8, 0.5), "right"),
    ((0.2, 0.8), "lower left"), ((0.5, 0.8), "bottom"), ((0.8, 0.8), "lower right"),
])
def test_places_have_their_names(centre, name):
    traits = shapes.name_traits(drawn_as(centre=centre))
    assert shapes.PLACES[traits[0, 3]] == name


def test_a_caption_says_what_the_traits_say():
    """Every row of traits once, with words that this test lists itself."""
    sizes = ["small|little|tiny", "medium|medium-sized", "large|big|huge"]
    rows, columns = "upper|top", "lower|bottom"
    traits = torch.cartesian_prod(*[torch.arange(k) for k in (10, 7, 3, 9)])
    captions = shapes.write_captions(traits)
    assert captions == shapes.write_captions(traits)          # the same each time
    for caption, (shape, colour, size, place) in zip(captions, traits.tolist()):
        words = caption.replace(",", "").split()
        said = [name for name in shapes.SHAPES if set(name.split()) <= set(words)]
        assert said == [shapes.SHAPES[shape]]
        assert [name for name in shapes.COLOURS if name in words] == [shapes.COLOURS[colour]]
        for number, synonyms in enumerate(sizes):
            assert bool(set(synonyms.split("|")) & set(words)) == (number == size), caption
        row, column = divmod(place, 3)
        assert bool(set(rows.split("|")) & set(words)) == (row == 0), caption
        assert bool(set(columns.split("|")) & set(words)) == (row == 2), caption
        assert ("left" in words) == (column == 0), caption
        assert ("right" in words) == (column == 2), caption
    assert len(set(captions)) > 0.95 * len(captions)


def test_the_wording_is_varied():
    captions = shapes.write_captions(torch.tensor([[3, 4, 0, 0]] * 500))
    assert len(set(captions)) > 20
