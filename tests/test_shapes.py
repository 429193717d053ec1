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
        return torch.zeros(n, 3, 2, 2, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)

    monkeypatch.setattr(shapes, "draw_shapes", draw_nothing)
    pixels, labels, split = shapes.shape_data()
    assert pixels.shape == (60_000, 3, 2, 2) and labels.shape == split.shape == (60_000,)
    assert len(seeds) == 60 and len(set(seeds)) == 60
    assert np.bincount(split).tolist() == [45_000, 5_000, 10_000]


def test_pixels_do_not_give_the_shape_away():
    pixels, labels, split = shapes.shape_data(limit=1500)
    x = pixels.flatten(1).float() / 255 - 0.5
    train, test = np.flatnonzero(split == TRAIN), np.flatnonzero(split == TEST)
    weights = probes.logistic_regression(x[train], labels[train], 10, 0.3)
    predicted = probes.predict(x[test], weights).argmax(1)
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
