"""The contrastive losses against loops, the views against formulas, and the two models."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_residual_block, slope
from torch import nn

from minissl import contrastive
from minissl.contrastive import BYOL, ImageEncoder, SimCLR, byol_loss, info_nce


ZEROS, EYE = torch.zeros(3), torch.eye(12)       # of colour images: whitening does nothing
COLUMNS = 20 * 64 + 2048                         # of the features at width 64


# ---------------------------------------------------------------- InfoNCE

def similarity_of(a, b, kind):
    dot = sum(x * y for x, y in zip(a, b))
    if kind == "dot":
        return dot
    length_of_a = math.sqrt(sum(x * x for x in a))
    length_of_b = math.sqrt(sum(y * y for y in b))
    return dot / (length_of_a * length_of_b)


def info_nce_by_loops(views, temperature, kind):
    """views: NumPy (V, B, D). One term for each anchor and each of its positives."""
    V, B, _ = views.shape
    terms = []
    for v, b in np.ndindex(V, B):                             # the anchor
        s = {}
        for w, c in np.ndindex(V, B):
            if (w, c) != (v, b):
                s[w, c] = similarity_of(views[v, b], views[w, c], kind) / temperature
        largest = max(s.values())
        total = sum(math.exp(value - largest) for value in s.values())
        for w in range(V):
            if w != v:                                        # the positive
                terms.append(largest + math.log(total) - s[w, b])
    return sum(terms) / len(terms)


@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("kind, temperature", [
    ("cosine", 0.5), ("cosine", 0.07), ("dot", 1.0), ("dot", 0.3),
])
def test_info_nce_equals_loops_by_value_and_gradient(V, kind, temperature):
    def reference(array):
        return info_nce_by_loops(array, temperature, kind)

    views = np.random.default_rng(V).normal(size=(V, 4, 3))
    x = torch.tensor(views, requires_grad=True)
    loss = info_nce(x, temperature, kind)
    assert loss.item() == pytest.approx(reference(views), rel=1e-12)
    loss.backward()
    for place in np.ndindex(views.shape):
        expected = slope(reference, views, place)
        assert float(x.grad[place]) == pytest.approx(expected, abs=1e-7)


def test_info_nce_of_two_images_by_hand():
    """The two views of an image agree, the two images stand at a right angle.

    So each row of the matrix is softmax(1, 0, 0), and the loss −log(e / (e + 2)).
    """
    a, b = [1.0, 0.0], [0.0, 1.0]
    loss = info_nce(torch.tensor([[a, b], [a, b]]), temperature=1.0)
    assert float(loss) == pytest.approx(-math.log(math.e / (math.e + 2)))


@pytest.mark.parametrize("V, B", [(2, 2), (2, 37), (4, 8)])
def test_info_nce_of_a_collapsed_encoder_is_ln_vb_minus_1(V, B):
    loss = info_nce(torch.ones(V, B, 7), 0.1)
    assert float(loss) == pytest.approx(contrastive.chance_level(V, B), rel=1e-5)
    assert contrastive.chance_level(V, B) == pytest.approx(math.log(V * B - 1))


@pytest.mark.parametrize("V", [2, 4])
def test_info_nce_of_a_perfect_encoder_is_ln_v_minus_1(V):
    """All views of an image agree, and different images stand at right angles."""
    views = torch.eye(5, dtype=torch.float64).expand(V, 5, 5)
    loss = info_nce(views, temperature=0.01)
    assert float(loss) == pytest.approx(math.log(V - 1), abs=1e-6)


def test_info_nce_of_two_views_is_cross_entropy():
    """NT-Xent: cross-entropy over a (2B, 2B) matrix, with the answers i + B mod 2B."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 5)
    z = F.normalize(x.flatten(0, 1), dim=1)
    s = (z @ z.T / 0.3).fill_diagonal_(float("-inf"))
    answers = torch.arange(18).roll(9)
    torch.testing.assert_close(info_nce(x, 0.3), F.cross_entropy(s, answers))


def test_self_similarity_is_in_no_value_and_no_gradient():
    """Each projection gets a separate column. With the dot product, this column enters
    the similarity of the projection with itself, and no other similarity."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    own = 7 * torch.eye(6, dtype=torch.float64)
    own = own.view(2, 3, 6).requires_grad_()
    loss = info_nce(torch.cat([x, own], dim=2), 0.5, "dot")
    loss.backward()
    torch.testing.assert_close(loss.detach(), info_nce(x, 0.5, "dot"))
    gradient = own.grad.flatten(0, 1)                         # (6, 6)
    assert (gradient.diagonal() == 0).all()
    assert gradient.abs().sum() > 0


def test_order_rotation_and_length_do_not_matter():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    loss = info_nce(x, 0.2)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    lengths = 9 * torch.rand(3, 5, 1)
    same = [x[:, torch.randperm(5)], x[[2, 0, 1]], x @ rotation, x * lengths]
    for other in same:
        torch.testing.assert_close(info_nce(other, 0.2), loss)
    all_views_alike = x[[0, 0, 0]]
    assert abs(info_nce(all_views_alike, 0.2) - loss) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_temperature_does_not_overflow(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8).to(dtype).requires_grad_()
    loss = info_nce(x, 0.001)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):               # the matrix stays in float32
        torch.testing.assert_close(info_nce(x, 0.001), loss)


@pytest.mark.parametrize("shape, options, sentence", [
    ((1, 4, 3), {}, "needs at least 2 views of 2 images, but got 1 views of 4"),
    ((2, 1, 3), {}, "needs at least 2 views of 2 images, but got 2 views of 1"),
    ((2, 4, 3), dict(temperature=0), "temperature must be above 0, but is 0"),
    ((2, 4, 3), dict(temperature=-1), "temperature must be above 0, but is -1"),
    ((2, 4, 3), dict(temperature=math.nan), "temperature must be above 0"),
    ((2, 4, 3), dict(similarity="l2"), "must be cosine or dot, but is 'l2'"),
])
def test_info_nce_refuses_what_it_cannot_compare(shape, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        info_nce(torch.randn(*shape), **{"temperature": 0.5, **options})


# ---------------------------------------------------------------- BYOL

@pytest.mark.parametrize("V", [2, 4])
def test_byol_loss_is_the_distance_of_unit_vectors(V):
    rng = np.random.default_rng(0)
    q, z = rng.normal(size=(V, 5, 4)), rng.normal(size=(V, 5, 4))
    distances = []
    for v, w in itertools.permutations(range(V), 2):
        for a, b in zip(q[v], z[w]):
            difference = a / np.linalg.norm(a) - b / np.linalg.norm(b)
            distances.append(sum(difference ** 2))
    loss = byol_loss(torch.tensor(q), torch.tensor(z))
    assert loss.item() == pytest.approx(np.mean(distances), rel=1e-12)


def test_byol_loss_of_known_cases():
    right, up = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])

    def loss(predictions, targets):
        """Of two views of one image."""
        return float(byol_loss(torch.stack(predictions)[:, None], torch.stack(targets)[:, None]))

    assert loss([right, up], [2 * up, right]) == pytest.approx(0, abs=1e-6)
    assert loss([right, up], [right, up]) == pytest.approx(2)
    assert loss([right, up], [-up, -right]) == pytest.approx(4)


def test_byol_loss_refuses_a_single_view():
    with pytest.raises(ValueError, match="at least 2 views, but got 1"):
        byol_loss(torch.randn(1, 5, 4), torch.randn(1, 5, 4))


def test_byol_loss_gives_the_target_no_gradient():
    torch.manual_seed(0)
    predictions = torch.randn(2, 5, 4, requires_grad=True)
    targets = torch.randn(2, 5, 4, requires_grad=True)
    byol_loss(predictions, targets).backward()
    assert targets.grad is None
    assert predictions.grad.abs().sum() > 0


def online_parameters(model):
    """Copies of what the target follows: the encoder's and the head's parameters, in order."""
    online = nn.Sequential(model.encoder, model.projection_head)
    return [p.detach().clone() for p in online.parameters()]


def target_parameters(model):
    return [p.detach().clone() for p in model.target.parameters()]


def test_byol_predicts_what_its_target_makes_of_a_view():
    torch.manual_seed(0)
    model = BYOL(ZEROS, EYE, width=8)
    other = BYOL(ZEROS, EYE, width=8)
    model.target.load_state_dict(other.target.state_dict())
    views = torch.rand(3, 4, 3, 16, 16)
    predictions, targets = model(views)
    projections = model.project(views)
    expected = model.target(views.flatten(0, 1)).view(3, 4, 128)
    torch.testing.assert_close(targets, expected)
    expected = model.predictor(projections.flatten(0, 1)).view(3, 4, 128)
    torch.testing.assert_close(predictions, expected)
    assert predictions.requires_grad and not targets.requires_grad


def test_the_target_starts_as_a_copy_without_gradient():
    model = BYOL(ZEROS, EYE, width=8)
    assert not any(p.requires_grad for p in model.target.parameters())
    assert len(target_parameters(model)) > 20
    for online, target in zip(online_parameters(model), target_parameters(model), strict=True):
        assert torch.equal(online, target)


def test_the_target_moves_by_its_rate():
    torch.manual_seed(0)
    model = BYOL(ZEROS, EYE)
    before = target_parameters(model)
    predictions, targets = model(torch.rand(2, 4, 3, 16, 16))
    byol_loss(predictions, targets).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    online = online_parameters(model)
    model.update_target(0.75)
    for old, moved, new in zip(before, target_parameters(model), online, strict=True):
        torch.testing.assert_close(moved, 0.75 * old + 0.25 * new)
    has_moved = [not torch.equal(*pair) for pair in zip(before, target_parameters(model))]
    assert sum(has_moved) > 10


def test_the_features_of_byol_do_not_depend_on_its_target():
    torch.manual_seed(0)
    model, x = BYOL(ZEROS, EYE, width=8).eval(), torch.rand(4, 3, 16, 16)
    before = model.encode(x)
    nn.init.normal_(model.target[0].to_last[0].weight)
    model.target[0].to_last[1].running_mean.fill_(3)
    assert torch.equal(model.encode(x), before)


def test_the_predictor_is_dense_norm_relu_dense():
    torch.manual_seed(0)
    predictor = BYOL(ZEROS, EYE, width=8).predictor
    z = torch.randn(16, 128)
    hidden = z @ predictor[0].weight.T
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
    expected = hidden.relu() @ predictor[3].weight.T
    torch.testing.assert_close(predictor(z), expected, atol=1e-4, rtol=1e-4)


def test_every_column_of_byols_projections_varies_alike():
    torch.manual_seed(0)
    views = torch.rand(2, 32, 3, 16, 16)
    byol, simclr = BYOL(ZEROS, EYE, width=8), SimCLR(ZEROS, EYE, width=8)
    for z in (byol.project(views), byol.project_by_target(views)):
        spread = z.flatten(0, 1).std(0, correction=0)         # (D,)
        assert (spread - 1).abs().max() < 0.01
    spread = simclr.project(views).flatten(0, 1).std(0, correction=0)
    assert (spread - 1).abs().min() > 0.01                    # SimCLR has no such norm


def test_the_targets_rate_rises_from_its_start_to_1():
    rates = [contrastive.target_rate(step, 100, 0.98) for step in range(101)]
    assert rates[0] == pytest.approx(0.98)
    assert rates[50] == pytest.approx(0.99)                   # halfway along the cosine
    assert rates[100] == pytest.approx(1)
    assert rates == sorted(rates)


# ---------------------------------------------------------------- what the loss does not show

def test_alignment_of_known_cases():
    apart = torch.eye(4)
    assert float(contrastive.alignment(torch.stack([apart, apart]))) == 0
    opposite = torch.stack([apart, -apart])
    assert float(contrastive.alignment(opposite)) == pytest.approx(4)


def test_uniformity_of_known_cases():
    apart = torch.eye(4)                                      # all squared distances are 2
    assert float(contrastive.uniformity(apart)) == pytest.approx(-4)
    collapsed = torch.ones(5, 3)
    assert float(contrastive.uniformity(collapsed)) == pytest.approx(0, abs=1e-5)


def test_alignment_and_uniformity_ignore_lengths():
    torch.manual_seed(0)
    z = torch.randn(2, 9, 4)
    scaled = z * (0.1 + 9 * torch.rand(2, 9, 1))
    torch.testing.assert_close(contrastive.alignment(z), contrastive.alignment(scaled))
    torch.testing.assert_close(contrastive.uniformity(z[0]), contrastive.uniformity(scaled[0]))


def test_effective_rank_of_known_cases():
    torch.manual_seed(0)
    apart = torch.eye(4)
    centred = torch.cat([apart, -apart])                      # four equal directions
    assert float(contrastive.effective_rank(centred)) == pytest.approx(4, rel=1e-5)
    moved = centred + 9                                       # only what varies counts
    assert float(contrastive.effective_rank(moved)) == pytest.approx(4, rel=1e-4)
    on_a_line = torch.randn(50, 1) * torch.ones(1, 6)
    assert float(contrastive.effective_rank(on_a_line)) == pytest.approx(1, rel=1e-2)


# ---------------------------------------------------------------- crops

def points_in_and_around(H, W):
    """A grid (4, 20, 20, 2) for sampling: inside, outside, corners, and the last pixel."""
    grid = 3 * torch.rand(4, 20, 20, 2) - 1.5
    grid[0] = torch.tensor([-1.0, 1.0])
    grid[1] = torch.tensor([1 - 1 / W, 1 - 1 / H])
    grid[2, ..., 0] = 100.0
    return grid


def sample_with_border_padding(x, grid):
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@pytest.mark.parametrize("H, W", [(8, 8), (32, 32), (64, 16)])
def test_sample_inside_equals_border_padding(H, W):
    torch.manual_seed(0)
    x, grid = torch.rand(4, 3, H, W), points_in_and_around(H, W)
    found = contrastive.sample_inside(x, grid)
    assert torch.equal(found, sample_with_border_padding(x, grid))


@pytest.mark.parametrize("H, W", [(9, 15), (33, 47), (1, 5), (500, 375)])
def test_sample_inside_of_other_sizes_differs_by_rounding(H, W):
    """1 − 1/47 is no float32. Rounding it moves a point by less than W · 2⁻²⁴ pixels."""
    torch.manual_seed(0)
    x, grid = torch.rand(4, 3, H, W), points_in_and_around(H, W)
    found = contrastive.sample_inside(x, grid)
    expected = sample_with_border_padding(x, grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=max(H, W) * 2**-24)


def bilinear(image, x, y):
    """image (C, H, W) at the point (x, y), where whole numbers are the pixels' centres.

    Beyond the border its last pixel is repeated. Returns (C,).
    """
    H, W = image.shape[1:]
    x, y = min(max(x, 0), W - 1), min(max(y, 0), H - 1)
    left, top = min(int(x), W - 2), min(int(y), H - 2)
    u, v = x - left, y - top
    upper = (1 - u) * image[:, top, left] + u * image[:, top, left + 1]
    lower = (1 - u) * image[:, top + 1, left] + u * image[:, top + 1, left + 1]
    return (1 - v) * upper + v * lower


def box_by_formula(numbers, H, W, crop):
    """(left, top, width, height) of a crop in pixels, from its five numbers."""
    area = crop + (1 - crop) * numbers[0]
    ratio = (4 / 3) ** (2 * numbers[1] - 1)
    width = W * min(1, math.sqrt(area * ratio))
    height = H * min(1, math.sqrt(area / ratio))
    return numbers[2] * (W - width), numbers[3] * (H - height), width, height


@pytest.mark.parametrize("H, W", [(12, 12), (9, 15)])
def test_a_crop_is_a_box_resampled_bilinearly(H, W):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, H, W), dtype=torch.uint8)
    numbers = torch.rand(6, 5)
    h, w = 6, 8
    views = contrastive.crop_and_flip(images, (h, w), numbers, 0.2, True).double().numpy()
    for image, row, view in zip(images.numpy() / 255.0, numbers.double().tolist(), views):
        left, top, width, height = box_by_formula(row, H, W, 0.2)
        is_mirrored = row[4] < 0.5
        for i, j in np.ndindex(h, w):
            column = w - 1 - j if is_mirrored else j
            x = left + (column + 0.5) * width / w - 0.5
            y = top + (i + 0.5) * height / h - 0.5
            np.testing.assert_allclose(view[:, i, j], bilinear(image, x, y), atol=2e-5)


def test_without_flip_no_view_is_mirrored():
    torch.manual_seed(0)
    ramp = torch.arange(16.0).mul(16).byte().expand(64, 1, 16, 16)
    no_colours = dict(jitter=0, hue=0, grey=0)
    views = contrastive.augment(
        ramp, (8, 8), torch.rand(64, 11), crop=0.5, flip=False, **no_colours
    )
    assert (views[..., -1] > views[..., 0]).all()


def test_the_sides_of_a_view_are_even_and_at_least_8():
    assert contrastive.view_shape(28, 28) == (20, 20)         # three quarters would be 21
    assert contrastive.view_shape(8, 8) == (8, 8)
    assert contrastive.view_shape(32, 64, height=16) == (16, 32)
    assert contrastive.view_shape(64, 8, height=32) == (32, 8)


# ---------------------------------------------------------------- colours

TO_YIQ = np.array([
    [0.299, 0.587, 0.114],
    [0.5959, -0.2746, -0.3213],
    [0.2115, -0.5227, 0.3112],
])


def recolour_by_loops(image, numbers, jitter, hue, grey):
    """image (3, h, w) NumPy: brightness, contrast, saturation and hue, in this order."""
    brightness, contrast, saturation, turn = 1.0, 1.0, 1.0, 0.0
    if numbers[0] < 0.8:
        brightness = 1 + jitter * (2 * numbers[1] - 1)
        contrast = 1 + jitter * (2 * numbers[2] - 1)
        saturation = 1 + jitter * (2 * numbers[3] - 1)
        turn = 2 * math.pi * hue * (2 * numbers[4] - 1)
    if numbers[5] < grey:
        saturation = 0.0
    image = image * brightness
    _, h, w = image.shape
    luma = [TO_YIQ[0] @ image[:, i, j] for i, j in np.ndindex(h, w)]
    mean = np.mean(luma)
    image = mean + contrast * (image - mean)
    result = np.empty_like(image)
    for i, j in np.ndindex(h, w):
        y, u, v = TO_YIQ @ image[:, i, j]
        turned_u = math.cos(turn) * u - math.sin(turn) * v
        turned_v = math.sin(turn) * u + math.cos(turn) * v
        yiq = [y, saturation * turned_u, saturation * turned_v]
        result[:, i, j] = np.linalg.solve(TO_YIQ, yiq).clip(0, 1)
    return result


def test_recolour_equals_its_four_steps_by_loops():
    torch.manual_seed(0)
    x, numbers = torch.rand(20, 3, 4, 5) * 0.5 + 0.25, torch.rand(20, 6)
    result = contrastive.recolour(x.clone(), numbers, jitter=0.2, hue=0.1, grey=0.3)
    images = x.double().numpy()
    for image, row, found in zip(images, numbers.double().tolist(), result.numpy()):
        expected = recolour_by_loops(image, row, 0.2, 0.1, 0.3)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    kept = int((numbers[:, 0] >= 0.8).sum())
    assert 0 < kept < 20                                      # both cases were compared


def test_grey_images_stay_grey():
    torch.manual_seed(0)
    grey = torch.rand(8, 1, 6, 6).expand(8, 3, 6, 6)
    result = contrastive.recolour(grey.clone(), torch.rand(8, 6), 0.4, 0.2, 0.0)
    assert float((result - result[:, :1]).abs().max()) < 1e-4


def test_images_of_one_channel_change_as_grey_ones_do():
    torch.manual_seed(0)
    one, numbers = torch.rand(8, 1, 6, 6), torch.rand(8, 6)
    three = one.expand(8, 3, 6, 6).clone()
    found = contrastive.recolour(one.clone(), numbers, 0.4, 0.2, 0.0)
    expected = contrastive.recolour(three, numbers, 0.4, 0.2, 0.0)[:, :1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- whole views

COLOURFUL = dict(crop=0.2, jitter=0.4, hue=0.1, grey=0.2)

def test_five_numbers_decide_the_crop_and_six_the_colours():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    numbers = torch.rand(40, 11)
    views = contrastive.augment(images, (8, 8), numbers, **COLOURFUL)
    crops = contrastive.crop_and_flip(images, (8, 8), numbers[:, :5], 0.2, True)
    expected = contrastive.recolour(crops, numbers[:, 5:], 0.4, 0.1, 0.2)
    torch.testing.assert_close(views, expected)


def test_the_fifth_number_mirrors_and_changes_nothing_else():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    numbers = torch.rand(40, 11)
    other = numbers.clone()
    other[:, 4] = 1 - other[:, 4]
    views = contrastive.augment(images, (8, 8), numbers, **COLOURFUL)
    mirrored = contrastive.augment(images, (8, 8), other, **COLOURFUL)
    torch.testing.assert_close(mirrored, views.flip(3), atol=1e-5, rtol=0)


def test_pixels_in_0_to_1_are_not_taken_for_bytes():
    with pytest.raises(ValueError, match="must be uint8, but are torch.float32"):
        contrastive.augment(torch.rand(2, 3, 16, 16), (8, 8), torch.rand(2, 11), **COLOURFUL)


@pytest.mark.parametrize("C", [1, 3])
def test_each_image_has_its_own_draw(C):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, C, 16, 16), dtype=torch.uint8)
    copies = image.expand(64, -1, -1, -1)
    views = contrastive.augment(copies, (12, 12), torch.rand(64, 11), **COLOURFUL).flatten(1)
    assert torch.pdist(views).min() > 1e-3                    # no two copies look alike
    assert views.min() >= 0 and views.max() <= 1


@pytest.mark.parametrize("C", [1, 3])
def test_a_view_does_not_depend_on_the_other_images(C):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, C, 16, 16), dtype=torch.uint8)
    numbers = torch.rand(2, 11)
    both = contrastive.augment(images, (12, 12), numbers, **COLOURFUL)
    alone = contrastive.augment(images[1:], (12, 12), numbers[1:], **COLOURFUL)
    torch.testing.assert_close(alone, both[1:])


# ---------------------------------------------------------------- the encoder

@pytest.mark.parametrize("C, H, W", [
    (3, 32, 32), (1, 28, 28), (3, 33, 47), (1, 8, 8), (3, 64, 64),
])
def test_the_encoder_takes_any_size(C, H, W):
    model = SimCLR(torch.zeros(C), torch.eye(4 * C))
    assert model(torch.rand(2, 3, C, H, W)).shape == (2, 3, 128)
    assert model.eval().encode(torch.rand(5, C, H, W)).shape == (5, COLUMNS)


def test_an_image_of_odd_size_is_padded_with_its_border():
    torch.manual_seed(0)
    encoder = ImageEncoder(ZEROS, EYE, width=8).eval()
    x = torch.rand(2, 3, 9, 11)
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(encoder(x), encoder(padded))


def test_each_square_of_pixels_is_whitened_by_the_matrix():
    torch.manual_seed(0)
    mean, whitening = torch.tensor([0.2, 0.5, 0.7]), torch.randn(12, 12)
    encoder = ImageEncoder(mean, whitening, width=8).eval()
    x = torch.rand(1, 3, 8, 8)
    white = torch.zeros(1, 12, 4, 4)
    for row in range(4):
        for column in range(4):
            square = x[0, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
            numbers = (square - mean[:, None, None]).flatten()            # channel by channel
            white[0, :, row, column] = whitening @ numbers
    second = encoder.to_second(white)
    found_second, found_last = encoder.maps(x)
    torch.testing.assert_close(found_second, second)
    torch.testing.assert_close(found_last, encoder.to_last(second))
    torch.testing.assert_close(encoder(x), found_last.mean((2, 3)))


def test_whitening_is_computed_in_float32():
    torch.manual_seed(0)
    encoder = ImageEncoder(ZEROS, torch.eye(12), width=8).eval()
    seen = []
    encoder.to_second[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(x)
    assert torch.equal(seen[0], F.pixel_unshuffle(x, 2))


def test_the_kernels_begin_as_the_identity():
    layer = contrastive.convolution(3, 5)
    x = torch.rand(2, 3, 6, 7)
    torch.testing.assert_close(layer(x)[:, :3], x)
    assert layer.weight[3:].abs().min() > 0                   # the others are random


def test_a_residual_block_begins_as_the_identity_and_adds_two_convolutions():
    block = contrastive.ResidualBlock(8)
    assert_residual_block(block, block.conv1, block.conv2, block.norm2)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def strip_means(maps, strips):
    """The mean of each horizontal strip; a row on the border of two strips counts in both."""
    H = maps.shape[2]
    means = []
    for n in range(strips):
        first, last = n * H / strips, (n + 1) * H / strips
        rows = [row for row in range(H) if row + 1 > first and row < last]
        means.append(maps[:, :, rows].mean((2, 3)))
    return np.concatenate(means, axis=1)


@pytest.mark.parametrize("cls", [SimCLR, BYOL])
@pytest.mark.parametrize("H, W", [(16, 24), (40, 16), (8, 8)])
def test_features_join_three_depths_each_of_length_1(H, W, cls):
    torch.manual_seed(0)
    model = cls(ZEROS, EYE, width=8).eval()
    x = torch.rand(3, 3, H, W)
    second, last = (maps.detach().numpy() for maps in model.encoder.maps(x))
    assert second.shape[2:] == (H // 4, W // 4) and last.shape[2:] == (H // 8, W // 8)
    average = last.mean((2, 3))
    dense, norm = model.projection_head[0], model.projection_head[1]
    hidden = average @ dense.weight.detach().numpy().T
    hidden = hidden / np.sqrt(1 + norm.eps)                   # no statistics have been taken yet
    hidden = np.maximum(hidden, 0)
    parts = [average, strip_means(last, 2), strip_means(second, 4), hidden]
    expected = np.concatenate([unit(part) for part in parts], axis=1)
    features = model.encode(x).detach().numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_features_do_not_depend_on_the_batch_and_move_nothing():
    torch.manual_seed(0)
    model = SimCLR(ZEROS, EYE).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(7, 3, 16, 16)
    with torch.no_grad():
        together, alone = model.encode(images)[3:4], model.encode(images[3:4])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_every_parameter_receives_a_gradient():
    torch.manual_seed(0)
    model = SimCLR(ZEROS, EYE)
    for module in model.modules():
        if isinstance(module, contrastive.ResidualBlock):
            nn.init.ones_(module.norm2.weight)                # it starts at 0: wake the block up
    info_nce(model(torch.rand(2, 8, 3, 16, 16)), 0.5).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_the_encoder_costs_49_million_multiply_adds():
    """As its docstring says: each kernel is used once for each place of its output."""
    encoder = ImageEncoder(ZEROS, EYE)
    counts = []

    def count(layer, inputs, output):
        places = output[0, 0].numel()
        counts.append(places * layer.weight.numel())

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    encoder(torch.rand(1, 3, 32, 32))
    assert round(sum(counts) / 1e6) == 49
